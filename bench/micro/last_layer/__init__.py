"""The last layer: squared gradient norms of all contrasts, of one target, and the layer fused with them.

Four tasks. ``contrasts``: features and logits in, ``(B, N)`` out. ``uniform target``: one norm a sample, the task of
GradNorm. ``head``: features and weights in, logits and ``(B, N)`` out. ``statistics``: the same, five numbers a
sample out.

Errors allowed, relative to float64: 1e-5 for fastgrad, 1e-3 for the peers, whose float32 autograd loses digits where
a probability is near one; 64 units of the dtype, relative to the largest entry, for logits and other plain products.
"""
