"""MDLM's and ReMDM's sampling updates on exact sampling, with the signatures of their `Diffusion` class.

    Diffusion._ddpm_update = randfuse.integrations.mdlm._ddpm_update
    Diffusion._ddpm_caching_update = randfuse.integrations.mdlm._remdm_update      # of ReMDM's repository

Whether a position changes is decided first: the network is not run where none does, which is what their cache is for,
and rows that stay are not sampled. Float32 Gumbel noise no longer lowers the temperature, and float64 is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..masked_diffusion import ancestral_step, remask_step

VARIANTS = {
    "mdlm": "cap", "remdm-cap": "cap", "remdm-rescale": "rescale", "remdm-conf": "conf", "remdm-loop": "loop",
    "forward-backward": "forward-backward",
}  # fmt: skip


def _ddpm_update(self: Any, x: Tensor, t: Tensor, dt: float, key: Tensor | None = None) -> Tensor:
    """MDLM's step from t (B,) or (B, 1) to t − dt, of any noise schedule `self.noise`. A key belongs to one step."""
    sigma_t, sigma_s = (self.noise(time)[0].reshape(len(x), -1)[:, 0] for time in (t, t - dt))
    m_t, m_s = (-torch.expm1(-sigma.double()) for sigma in (sigma_t, sigma_s))
    logits = lambda rows: self.forward(x, sigma_t).flatten(0, 1)[rows]  # noqa: E731
    return ancestral_step(logits, x, m_t, m_s, mask_id=self.mask_index, key=key)


def _remdm_update(
    self: Any,
    x: Tensor,
    t: Tensor,
    dt: float,
    p_x0: Tensor | None = None,
    conf: Tensor | None = None,
    key: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """ReMDM's step: what it returns for a cache, the tokens, and minus the probabilities of decoded tokens ("conf").

    `self.config.sampling` names the sampler and its eta, nucleus_p, t_on, t_off, alpha_on. The nucleus keeps the token
    that crosses nucleus_p, which ReMDM's own drops.
    """
    config = self.config.sampling
    if config.sampler not in VARIANTS:
        raise ValueError(f"_remdm_update: sampler must be one of {', '.join(VARIANTS)}, got {config.sampler!r}")
    time = t.reshape(len(x), -1)[:, 0].double()
    kept: list[Tensor] = [] if p_x0 is None else [p_x0]

    def logits(rows: Tensor) -> Tensor:
        if not kept:
            kept.append(self.forward(x, self.noise(time.to(t.dtype))[0].reshape(len(x), -1)[:, 0]).exp())
        return kept[0].flatten(0, 1)[rows].log()

    options: dict[str, Any] = {"variant": VARIANTS[config.sampler], "mask_id": self.mask_index, "key": key}
    options["eta"] = {"mdlm": 0.0, "remdm-conf": None, "forward-backward": None}.get(config.sampler, config.eta)
    if config.sampler == "remdm-loop":
        options |= {"t_on": config.t_on, "t_off": config.t_off, "alpha_on": config.alpha_on}
    if config.nucleus_p < 1:
        options["top_p"] = config.nucleus_p
    if config.sampler == "remdm-conf":
        options["confidence"] = None if conf is None else (-conf.float()).where(conf > -torch.inf, 0.0)
    new, held = remask_step(logits, x, time, (time - dt).clamp(min=0), **options)
    if held is not None:
        decoded = (new != self.mask_index) & (held > 0)
        conf = (-held).where(decoded, -torch.inf).to(torch.float32 if conf is None else conf.dtype)
    stays = bool((new == x).all()) and not self.time_conditioning
    return (kept[0] if stays and kept else None), new, conf
