"""How unusual an input is, and how likely its answer is wrong.

The method in fifteen lines, a module or function each:

1.  `collect.draw`: draw clean inputs uniformly from the whole loader, in one pass.
2.  `price`: take the blocks of the preset that the network can serve, and off its end until the rest fits.
3.  `collect.read`: read the blocks of each clean input from its forward pass.
4.  `collect.generated_batches`: generate challenges from the clean inputs, and read the same blocks of them.
5.  `calibrate.deal`: deal clean inputs into folds; challenges go with the input that they were made from.
6.  `calibrate.fit_scores`: score each block by a one-class model of the clean inputs outside a fold.
7.  `challenge_classifier`: fit one linear classifier of clean inputs and kinds of challenge on the same rows.
8.  `calibrate.fit_detector`: apply both to the fold left out, and fit them once more on everything.
9.  `fastgrad.scores.conformal`: a score becomes the p-value that a clean input left out has so high a one.
10. `DetectorModule.evidence`: -log p, capped; the classifier's counts three times.
11. `DetectorModule.explain`: sum it; the p-value of the sum among clean inputs left out is the uncertainty, -log p.
12. `temperature`: labels of clean inputs make the probabilities as often right as they say.
13. `risk`: the answer is wrong because the network is unsure, or because the input misleads it; how far evidence speaks
    for the second, and how often each kind of challenge does, is learned on clean inputs and challenges, each with the
    evidence of what was fitted without it.
14. `report`: what was read, drawn and dropped, the price, and on demand what each block adds on kinds left out.
15. `storage`: all of it is one module of named tensors, in one file without code.
"""

from fastgrad.detector.estimator import UncertaintyDetector

__all__ = ["UncertaintyDetector"]
