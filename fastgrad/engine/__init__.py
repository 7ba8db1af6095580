"""Run a model on each sample of a batch at once, and take squared norms of each sample's gradients from one backward pass.

`run` calls the model under ``vmap``; `mode` sees the functions that it calls and has rules of `fastgrad.layers` run them
on the batch; `layout` and `state` turn what samples gave and wrote into that of the batch; `norms` sends a gradient back.
"""
