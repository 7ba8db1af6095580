"""The whole network: one squared gradient norm for every sample and parameter tensor.

Every implementation computes the same ``(B, P)`` matrix for the same loss and labels; the training step (one forward
and one full backward pass of the batch, without an optimizer) is the yardstick. Networks are in evaluation mode, where
samples do not mix; peers that insist on training mode get it where the network has nothing that depends on it.

A result is checked on the first and the last sample against a float64 backward pass of that sample alone, relative to
the norm itself, or to a millionth of a millionth of the sample's total where the true gradient is zero (the key's bias
of an attention, say). Allowed: 1e-4 for fastgrad, 1e-3 for the peers.
"""
