"""Run a model on all samples of a batch, each as if it were alone, and compute each sample's squared gradient norms.

`run` calls the model under ``vmap``. `mode` sees each function that the model calls, and lets the rules of
`fastgrad.layers` run it on the batch. `layout` and `state` turn the outputs and writes of samples into those of the
batch. `norms` and `products` take one backward pass to norms and inner products.
"""
