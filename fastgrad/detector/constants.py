"""Numbers of the detector's method, with their reasons and where they were tuned; those of a score stand beside it.

*Photographs* are 400 images of ImageNet's classes and 45 generated challenges with 24 images each, for
EfficientNet-Lite0 and Lite1, tested on 28 sets that are not generated. AUROC below is the mean over those sets, from
when the challenge classifier saw principal components of activations alone (`fastgrad.blocks.block.JOINT`).
"""

from __future__ import annotations

#: Folds of the clean inputs; a fit on the others scores each. Photographs: two .911, five .914, ten .915 at twice the
#: time. With few inputs, more folds make these fits more like the fit on all inputs.
FOLDS = 5
#: Folds below `FEW` clean inputs, and folds if other inputs calibrate: the folds then give p-values their scale and
#: promise nothing.
FEW, FOLDS_OF_FEW, FOLDS_OF_SPLIT = 300, 10, 3
#: From this many clean inputs on, a part of them only calibrates, which is exact. With fewer, the loss of inputs to fit
#: on would cost more than exactness gives (photographs: .4 of 400 held out costs .013).
SPLIT_FROM = 1000
#: The share of that part.
SPLIT_SHARE = 0.2
#: Largest -log p that one score may contribute to the sum, so that none decides alone: one in 500 million.
CAP = 20.0
#: Weight of the challenge classifier; a one-class score has 1. Photographs, with weights 1, 2, 3, 4, 6: .895, .909,
#: .914, .915, .914.
WEIGHT = 3.0
#: c of the challenge classifier's penalty ``||W||^2 / (2 c n)``, and most steps of L-BFGS. Tuned on photographs.
INVERSE_PENALTY, STEPS = 0.03, 60
#: Standardised rows are clipped here, so that no single column, however far out, decides alone.
LIMIT = 50.0
#: Clean inputs kept from a loader, drawn uniformly. More change little and cost memory, 600 KB for an image of 224
#: pixels.
MOST_CLEAN = 2000
#: Challenges generated from each clean input, and limit of their total if inputs are many. Three cost seven forward
#: passes over the clean inputs, and more add little. Photographs with a third of all challenges: .890 instead of .909.
EACH, MOST_CHALLENGES = 3, 3000
#: Clean inputs whose challenges are made together: an attack is fast on large batches.
CHALLENGED_TOGETHER = 256
#: With fewer clean inputs, a false-alarm rate of .05 cannot be promised.
FEWEST_CLEAN = 20
#: Images that span less than this share of the range from black to white contradict it: unit images read as bytes do.
LEAST_SPREAD = 0.01
#: With fewer labelled clean inputs, there is no temperature, no risk and no correction.
FEWEST_LABELLED = 30
#: Largest number of L-BFGS steps for the risk; a dozen are usually enough.
RISK_STEPS = 200
#: Share of the clean images that are shifted by up to one grey level, and grey levels from black to white. A quarter in
#: place of a half flags .11 instead of .08 of digits that are darker by one level.
SHIFTED, LEVELS = 0.5, 255
#: Clean images on which the report tries what one grey level does.
TRIED = 200
#: Odds of an error, by the kinds of challenge, far below which they are no evidence for the risk. Log loss over all,
#: photographs and a ResNet-20: 1: .554, but clean photographs lose .01 of AUROC; .1: .558; .01: .561; .001: .562.
FLOOR = 0.1
