"""Every number that the detector's method rests on, with its reason and where it was tuned.

*Photographs* are 400 of ImageNet's classes with EfficientNet-Lite0 and Lite1 and 45 generated challenges of 24 each,
tested on 28 sets that are not generated. AUROC below is the mean over those sets, taken while the classifier of
challenges saw principal components of activations alone (`fastgrad.blocks.block.JOINT`).
"""

from __future__ import annotations

#: Parts of the clean inputs of which each is scored by what was fitted on the others. Photographs: two .911, five .914,
#: ten .915 at twice the time. With few inputs more parts bring those fits nearer to the one on all.
FOLDS = 5
#: Below `FEW` clean inputs so many; and so many where other inputs calibrate, for then the parts give p-values their
#: scale and promise nothing.
FEW, FOLDS_OF_FEW, FOLDS_OF_SPLIT = 300, 10, 3
#: From so many clean inputs on a part calibrates and nothing else, which is exact; with fewer, the loss of inputs to
#: fit on would cost more than exactness gives (photographs: .4 of 400 held out costs .013).
SPLIT_FROM = 1000
#: That part.
SPLIT_SHARE = 0.2
#: Largest -log p that one score may contribute to the sum, so that none decides alone: one in 500 million.
CAP = 20.0
#: How much the classifier of challenges counts beside a one-class score's 1. Photographs, 1, 2, 3, 4, 6: .895, .909,
#: .914, .915, .914.
WEIGHT = 3.0
#: C of the classifier of challenges, whose penalty is ``||W||^2 / (2 C n)``, and steps of L-BFGS. Tuned on photographs.
INVERSE_PENALTY, STEPS = 0.03, 60
#: Standardised rows are cut here, so that no single column, however far out, decides alone.
LIMIT = 50.0
#: Clean inputs that are kept of a loader, drawn uniformly. More change little and cost memory, an image of 224 pixels
#: 600 KB.
MOST_CLEAN = 2000
#: Challenges generated of each clean input, and in all, where there are many inputs. Three cost seven forward passes
#: of the clean inputs, and more say little more: photographs with a third of all challenges, .890 for .909.
EACH, MOST_CHALLENGES = 3, 3000
#: Clean inputs whose challenges are made together: an attack is fast on large batches.
CHALLENGED_TOGETHER = 256
#: Share of the labelled clean inputs that an introspective classifier is not trained on: they calibrate it.
UNSEEN = 0.2
#: With fewer clean inputs no false-alarm rate of .05 can be promised.
FEWEST_CLEAN = 20
#: Images that spread over less of the range from black to white contradict it: unit images among bytes are all black.
LEAST_SPREAD = 0.01
#: Fewer labelled clean inputs give no temperature and no risk.
FEWEST_LABELLED = 30
#: Steps of L-BFGS for the risk, at most; a dozen are enough as a rule.
RISK_STEPS = 200
#: Odds of an error by the kinds of challenge far below which they are no evidence for the risk. Log loss of everything,
#: photographs and a ResNet-20: 1 .554, but clean photographs lose .01 of AUROC; .1 .558, .01 .561, .001 .562.
FLOOR = 0.1
