"""What random programs are made of: tables of source text, one row a kind of step.

A program is a tree of steps on ``h`` (B, T, 4). In each row ``{n}`` is the step's own name. ``c`` carries what the
caller chose: ``mode``, ``depth``, ``big`` (whether the input is unusual) and ``mask`` (T, T).
"""

from __future__ import annotations


def layer(constructor: str, call: str = "self.{n}(h)") -> tuple[str, str]:
    """Return the row of a step that is one layer."""
    return f"self.{{n}} = {constructor}", f"h = {call}"


def bare(shape: str, call: str) -> tuple[str, str]:
    """Return the row of a step with one parameter that no layer owns."""
    return f"self.{{n}} = nn.Parameter(torch.randn({shape}) / 2)", f"h = {call}"


_CHANNELS = "self.{n}(h.mT).mT"
_IMAGE = "self.{n}(h.unflatten(2, (2, 2)).transpose(1, 2)).transpose(1, 2).flatten(2)"

#: Steps without steps inside: what ``__init__`` says, what ``forward`` says.
LEAVES: dict[str, tuple[str, str]] = {
    # Layers with rules.
    "linear": layer("nn.Linear(4, 4)"),
    "linear without bias": layer("nn.Linear(4, 4, bias=False)"),
    "wide linear": layer("nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))"),
    "convolution 1d": layer("nn.Conv1d(4, 4, 3, padding=1)", _CHANNELS),
    "grouped convolution": layer("nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=2)", _CHANNELS),
    "circular convolution": layer("nn.Conv1d(4, 4, 3, padding=1, padding_mode='circular')", _CHANNELS),
    "convolution 2d": layer("nn.Conv2d(2, 2, 3, padding=1)", _IMAGE),
    "convolution 3d": layer("nn.Conv3d(1, 1, 3, padding=1)",
        "self.{n}(h.unflatten(2, (2, 2)).unsqueeze(1)).squeeze(1).flatten(2)"),
    "transposed convolution": layer("nn.ConvTranspose1d(4, 4, 3, padding=1)", _CHANNELS),
    "layer norm": layer("nn.LayerNorm(4)"),
    "RMS norm": layer("nn.RMSNorm(4)"),
    "group norm": layer("nn.GroupNorm(2, 4)", _CHANNELS),
    "instance norm": layer("nn.InstanceNorm2d(2, affine=True)", _IMAGE),
    "batch norm": layer("nn.BatchNorm1d(4).eval()", _CHANNELS),
    "PReLU": layer("nn.PReLU()"),
    "positions": layer("nn.Embedding(9, 4)", "h + self.{n}(torch.arange(T))"),
    "bag": layer("nn.EmbeddingBag(5, 4)", "h + self.{n}((h * 3).round().long().abs().amax(2) % 5).unsqueeze(1)"),
    "attention": layer("nn.MultiheadAttention(4, 2, batch_first=True)", "self.{n}(h, h, h)[0]"),
    "attention with a mask": layer("nn.MultiheadAttention(4, 2, batch_first=True)",
        "self.{n}(h, h, h, attn_mask=c['mask'], need_weights=False)[0]"),
    "attention, batch second": layer("nn.MultiheadAttention(4, 2, bias=False, add_bias_kv=True)",
        "self.{n}(h.transpose(0, 1), h.transpose(0, 1), h.transpose(0, 1))[0].transpose(0, 1)"),
    "transformer layer": layer("nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)", "self.{n}(h)"),
    "LSTM": layer("nn.LSTM(4, 4, batch_first=True)", "self.{n}(h)[0]"),
    "GRU both ways": layer("nn.GRU(4, 2, bidirectional=True)", "self.{n}(h.transpose(0, 1))[0].transpose(0, 1)"),
    "GRU's last state": layer("nn.GRU(4, 4, batch_first=True)", "h + self.{n}(h)[1].transpose(0, 1)"),
    # Cells and layers unrolled over the sequence.
    "GRU cell": ("self.{n} = nn.GRUCell(4, 4)",
        "s, o = h[:, 0] * 0, []\nfor t in range(T):\n    s = self.{n}(h[:, t], s)\n    o.append(s)\n"
        "h = torch.stack(o, 1)"),
    "LSTM cell": ("self.{n} = nn.LSTMCell(4, 4)",
        "s = None\nfor t in range(T):\n    s = self.{n}(h[:, t], s)\nh = h + s[0].unsqueeze(1)"),
    "unrolled linear": ("self.{n} = nn.Linear(4, 4)",
        "s = h[:, 0]\nfor t in range(T):\n    s = torch.tanh(self.{n}(s) + h[:, t])\nh = h * s.unsqueeze(1)"),
    # Layers without rules, reparametrized layers, parameters without layers.
    "bilinear": layer("nn.Bilinear(4, 4, 4)", "self.{n}(h, h.flip(2))"),
    "weight norm": layer("nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))"),
    "spectral norm": layer("nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))"),
    "shift": bare("4", "h + self.{n}"),
    "shift of every position": bare("1, 1, 4", "h + self.{n}"),
    "scale": bare("()", "h * (1 + self.{n})"),
    "class token": bare("1, 1, 4", "torch.cat([self.{n}.expand(B, 1, 4), h], 1)[:, :T]"),
    "bare matrix": bare("4, 4", "h @ self.{n}"),
    "einsum": bare("2, 4, 2", "torch.einsum('btd,kdo->btko', h, self.{n}).flatten(2)"),
    "table by index": bare("9, 4", "h + self.{n}[:T]"),
    "standardized weight": bare("4, 4", "nn.functional.linear(h, (self.{n} - self.{n}.mean()) / self.{n}.std())"),
    "pruned weight": ("self.{n} = nn.Linear(4, 4)\nself.register_buffer('{n}m', torch.ones(4, 4).tril())",
        "h = nn.functional.linear(h, self.{n}.weight * self.{n}m, self.{n}.bias)"),
    "functional use": layer("nn.Linear(4, 4)", "nn.functional.linear(h, self.{n}.weight)"),
    "used in two ways": layer("nn.Linear(4, 4)", "self.{n}(h) + nn.functional.linear(h, self.{n}.weight.t())"),
    "unused": ("self.{n} = nn.Linear(4, 4)", "pass"),
    "frozen": layer("nn.Linear(4, 4).requires_grad_(False)"),
    "LoRA": ("self.{n} = nn.Linear(4, 4).requires_grad_(False)\nself.{n}a = nn.Linear(4, 2, bias=False)\n"
        "self.{n}b = nn.Parameter(torch.randn(4, 2))", "h = self.{n}(h) + self.{n}a(h) @ self.{n}b.T"),
    "list and dictionary": layer("nn.ModuleDict({{'a': nn.Linear(4, 4), 'b': nn.ModuleList([nn.Linear(4, 4)])}})",
        "self.{n}['a'](h) if c['mode'] == 'a' else self.{n}['b'][0](h)"),
    "parameter list": layer("nn.ParameterList([torch.randn(4), torch.randn(4)])", "h * self.{n}[c['depth'] % 2]"),
    "parts called by hand": ("self.{n} = nn.Sequential(nn.Linear(4, 4), nn.Tanh())",
        "for part in self.{n}:\n    h = part(h)"),
    "functional call": layer("nn.Linear(4, 4)",
        "torch.func.functional_call(self.{n}, dict(self.{n}.named_parameters()), (h,))"),
    "layer with a hook on its input": ("self.{n} = nn.Linear(4, 4)\n"
        "self.{n}.register_forward_pre_hook(lambda module, args: (2 * args[0],))",
        "h = self.{n}(h)"),
    "embedding scaled by frequency": layer("nn.Embedding(5, 4, scale_grad_by_freq=True)",
        "h + self.{n}((h * 3).round().long().abs().amax(2) % 5)"),
    # Experts.
    "experts by mask": ("self.{n} = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])",
        "o = torch.zeros_like(h)\nfor i, e in enumerate(self.{n}):\n    m = (h[..., 0] > 0) == bool(i)\n"
        "    o[m] = e(h[m])\nh = o"),
    "experts of samples": ("self.{n} = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])",
        "m = (h[:, :1, :1] > 0).to(h.dtype)\nh = m * self.{n}[0](h) + (1 - m) * self.{n}[1](h)"),
    "experts by bmm": bare("3, 4, 4", "torch.bmm(h, self.{n}[(h[:, 0, 0] > 0).long()])"),
    "experts by einsum": bare("2, 4, 4", "torch.einsum('btd,edo,bte->bto', h, self.{n}, h[..., :2].softmax(-1))"),
    # Steps without parameters.
    "tanh": ("", "h = torch.tanh(h)"),
    "ReLU in place": ("", "h = nn.functional.relu_(h * 1.0)"),
    "in place": ("", "h = h + 0\nh += 0.5\nh.mul_(0.9)"),
    "view written to": ("", "h = h.clone()\nh[:, :, :2] = torch.sigmoid(h[:, :, 2:])"),
    "activation after a layer, in place": ("self.{n} = nn.Linear(4, 4)\nself.{n}r = nn.ReLU(inplace=True)",
        "h = self.{n}r(self.{n}(h))"),
    "dropout": ("", "h = nn.functional.dropout(h, 0.5, self.training)"),
    "detached": ("", "h = h + torch.tanh(h).detach()"),
    "buffer": ("self.register_buffer('{n}', torch.rand(4))", "h = h * self.{n}"),
    "gradient scaled": ("", "h = h * 1.0\nif h.requires_grad:\n    h.register_hook(lambda g: 2 * g)"),
    "masked sequence": ("", "h = c['mask'].logical_not().to(h.dtype).softmax(-1) @ h"),
    "buffer counted": ("self.register_buffer('{n}', torch.zeros(()))",
        "if self.training:\n    self.{n} += 1\nh = h * self.{n}.cos()"),
    "buffer assigned": ("self.register_buffer('{n}', torch.zeros(()))",
        "self.{n} = self.{n} + 1\nh = h * self.{n}.cos()"),
    "function of one's own": ("", "h = Scaled.apply(h)"),
    "attribute counted": ("self.{n} = 0", "self.{n} += 1\nh = h * (1 + self.{n} % 2)"),
    "samples mixed": ("", "h = h - 0.1 * h.mean(0, keepdim=True)"),
    # What changes between calls: reductions, values that are annealed, parameters by length, states.
    "scaled by its norm": ("", "h = h / (1 + h.detach().square().mean((1, 2), keepdim=True).sqrt())"),
    "term annealed": ("self.value{n} = 0.0\nself.{n} = nn.Linear(4, 4)", "h = h + self.value{n} * self.{n}(h)"),
    "attribute annealed": ("self.value{n} = 0.0", "h = h * (1 + self.value{n})"),
    "gate": bare("()", "h + torch.relu(self.{n}) * torch.tanh(h)"),
    "bias of attention at one length": bare("2, 2",
        "nn.functional.scaled_dot_product_attention(h.unsqueeze(1), h.unsqueeze(1), h.unsqueeze(1), "
        "attn_mask=self.{n} if T == 2 else None).squeeze(1)"),
    "script at one length": bare("4", "scripted(h, self.{n}) if T == 2 else h"),
    "view at one length": bare("4, 4", "h @ self.{n}.view(16).view(4, 4).t() if T == 2 else h"),
    "state": ("self.state{n} = None\nself.{n} = nn.RNNCell(4, 4)",
        "s = self.state{n} if self.state{n} is not None and len(self.state{n}) == len(h) else None\n"
        "s = self.{n}(h.mean(1), s)\nself.state{n} = s.detach()\nh = h + s.unsqueeze(1)"),
}  # fmt: skip

#: Steps around a block of steps, whose call is ``{call}``.
WRAPPERS: dict[str, tuple[str, str]] = {
    "block": ("", "h = {call}"),
    "residual": ("", "h = h + {call}"),
    "twice": ("", "h = {call}\nh = torch.tanh({call})"),
    "loop": ("", "for _ in range(c['depth']):\n    h = {call}"),
    "loop over the sequence": ("", "for _ in range(T):\n    h = torch.tanh({call})"),
    "position by position": ("", "s = h\nh = torch.cat([self.{b}(s[:, t : t + 1], c) for t in range(T)], 1)"),
    "sample by sample": ("", "s = h\nh = torch.cat([self.{b}(s[i : i + 1], c) for i in range(B)]) if B else h"),
    "branch on argument": ("", "if c['mode'] == 'a':\n    h = {call}"),
    "branch on state": ("self.on{n} = True", "if self.on{n}:\n    h = {call}"),
    "branch on input": ("", "if c['big']:\n    h = {call}"),
    "branch on data": ("", "if h.detach().mean() > 0.01:\n    h = {call}"),
    "branch on batch size": ("", "if B > 3:\n    h = {call}"),
    "branch on mode": ("", "if self.training:\n    h = {call}"),
    "branch at random": ("", "if self.training and torch.rand(()) < 0.5:\n    h = {call}"),
    "loop on data": ("", "n = 0\nwhile n < 3 and h.detach().abs().mean() > 0.2:\n    h, n = 0.5 * {call}, n + 1"),
    "without gradients": ("", "with torch.no_grad():\n    g = {call}\nh = h + g"),
    "checkpoint": ("", "h = checkpoint(self.{b}, h, c, use_reentrant=False)"),
    "folded": ("", "s = h\nh = self.{b}(s.reshape(B * T, 1, 4), c).reshape(B, T, 4)"),
    "batch second": ("", "h = self.{b}(h.transpose(0, 1), c | dict(mask=torch.zeros(B, B).bool())).transpose(0, 1)"),
    "reversed batch": ("", "h = self.{b}(h.flip(0), c).flip(0)"),
    "sorted batch": ("", "o = h.detach().sum((1, 2)).argsort()\nh = self.{b}(h[o], c)[o.argsort()]"),
    "batch doubled": ("", "h = self.{b}(torch.cat([h, -h]), c)\nh = h[:B] + h[B:]"),
    "batch repeated": ("", "h = self.{b}(h.repeat_interleave(2, 0), c).unflatten(0, (B, 2)).sum(1)"),
    "first sample": ("", "h = torch.cat([self.{b}(h[:1], c), h[1:]])"),
    "batch in halves": ("", "h = torch.cat([self.{b}(p, c) for p in h.split(max(1, (B + 1) // 2))])"),
    "hook": ("self.{b}.register_forward_hook(lambda module, args, output: output * 0.5)", "h = {call}"),
    "part of the layers twice": ("", "h = {call} + self.{b}(h * 0.5, c)"),
}  # fmt: skip

#: What the first step makes of ``x``, by the kind of input.
INPUTS: dict[str, tuple[str, str]] = {
    "features": ("", "h = x"),
    "lifted features": ("self.lift = nn.Linear(4, 4)", "h = self.lift(x)"),
    "tokens": ("self.lift = nn.Embedding(7, 4)", "h = self.lift(x)"),
    "tokens of a padded table": ("self.lift = nn.Embedding(7, 4, padding_idx=0)", "h = self.lift(x)"),
}  # fmt: skip

#: Logits z (B, 3) from h.
HEADS: dict[str, tuple[str, str]] = {
    "mean": ("self.head = nn.Linear(4, 3)", "z = self.head(h.mean(1))"),
    "last": ("self.head = nn.Linear(4, 3)", "z = self.head(h)[:, -1]"),
    "largest": ("self.head = nn.Linear(4, 3)", "z = self.head(h.amax(1))"),
    "functional": ("self.head = nn.Parameter(torch.randn(3, 4))", "z = nn.functional.linear(h, self.head).sum(1)"),
    "none": ("", "z = h.mean(1)[:, :3]"),
}  # fmt: skip

#: What the model returns.
OUTPUTS: dict[str, str] = {
    "logits": "return z",
    "dictionary": "return {'logits': z, 'hidden': h}",
    "tuple": "return z, [h, {'twice': 2 * z}]",
    "loss": "return {'logits': z, 'loss': nn.functional.cross_entropy(z, z.detach().argmin(1))}",
    "loss alone": "return z.square().mean()",
    "sum": "return z, z.square().sum()",
    "loss of what is not padded": "k = (h.detach()[..., 0] > 0).to(h.dtype)\n"
        "return z, (h.square().mean(2) * k).sum() / k.sum().clamp(min=1)",
    "hinge": "return z, nn.functional.relu(z - z.detach().amax(1, keepdim=True)).mean()",
}  # fmt: skip

#: What ``__init__`` does at its end with two linear layers ``{a}`` and ``{b}`` of the tree.
TIES: dict[str, str] = {
    "weight shared": "{a}.weight = {b}.weight",
    "bias shared": "{a}.bias = {b}.bias",
    "weight frozen": "{a}.weight.requires_grad_(False)",
    "weight in a list": "self.held = [{a}.weight]",
}  # fmt: skip

#: What happens between calls, on the session of `fuzz.session`.
ACTIONS: dict[str, str] = {
    "optimizer step": "session.step()",
    "state switched": "session.switch()",
    "training mode": "session.model.train()",
    "evaluation mode": "session.model.eval()",
    "float32": "session.model.float()",
    "float64": "session.model.double()",
    "parameters frozen": "session.freeze()",
    "layer replaced": "session.replace()",
    "values annealed": "session.vary()",
    "parameters at zero": "session.zero()",
}
