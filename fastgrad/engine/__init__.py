"""Run a model on all samples of a batch, each as if it were alone, and take each sample's squared gradient norms.

`run` calls the model under ``vmap``; `mode` sees the functions that it calls and has the rules of `fastgrad.layers` run
them on the batch. `layout` and `state` turn what samples gave and wrote into what the batch gives and writes, and
`norms` sends output gradients back.
"""
