"""Run a model on all samples of a batch, each as if it were alone, and compute each sample's squared gradient norms.

`run` puts together what `samples` gives, which calls the model under ``vmap``. `mode` sees each function that the model
calls, and lets the rules of `fastgrad.layers` run it on the batch. `outputs` finds the batch in what samples return,
from shapes; `writes` keeps what they write, and `ordinary` and `compare` refuse models that mix samples. `norms` and
`products` take one backward pass to norms and inner products.
"""
