"""How unusual an input is, and how likely its answer is wrong.

The method in fourteen lines, a module or function each:

1.  `loaders.draw`: draw clean inputs uniformly from the whole loader, in one pass.
2.  `collect.read`: read the default blocks that the network can serve, from each clean input's forward pass.
3.  `collect.batches_of`: generate challenges from the clean inputs, and read the same blocks from them.
4.  `calibrate.assign_folds`: deal clean inputs into folds; a challenge goes with the input that it was made from.
5.  `calibrate.fit_scores`: score each block by a one-class model of the clean inputs outside a fold.
6.  `challenge_classifier`: fit one linear classifier of clean inputs and kinds of challenge on the same rows.
7.  `calibrate.calibrate`: apply both to the fold left out, and fit them once more on all folds.
8.  `fastgrad.scores.conformal`: turn a score into a p-value, the chance that a clean input left out scores as high.
9.  `DetectorModule.evidence`: cap -log p; that of the challenge classifier counts three times.
10. `DetectorModule.explain`: sum the evidence; the uncertainty is -log of its p-value among clean inputs left out.
11. `fastgrad.scores.temperature`: calibrate the probabilities on labels of clean inputs.
12. `risk`: an answer is wrong because the network is unsure, or because the input misleads it. How far the evidence and
    the kind of challenge point to the second is learned from inputs and challenges, by fits without each.
13. `report`: say what was read, drawn and left out, and the predicted price; `price` measures it when asked.
14. `storage`: save everything that was fitted as named tensors, in one file without code.
"""

from fastgrad.detector.estimator import UncertaintyDetector

__all__ = ["UncertaintyDetector"]
