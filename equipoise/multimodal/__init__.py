"""Several modalities: a strong one leaves the other encoders under-trained."""

from equipoise.multimodal.arl import (
    ARL,
    ARLCoefficients,
    ConcatFusion,
    GatedFusion,
    SumFusion,
    arl_coefficients,
    arl_loss,
    concat_unimodal_logits,
    scale_gradient,
)
from equipoise.multimodal.baselines import Aux, AuxScaled, Joint, Unimodal
from equipoise.multimodal.model import MultimodalNet, make_net
from equipoise.multimodal.ogm_ge import OGMGE, modality_scores, ogm_coefficients
from equipoise.multimodal.task import Multimodal

__all__ = [
    "ARL",
    "OGMGE",
    "ARLCoefficients",
    "Aux",
    "AuxScaled",
    "ConcatFusion",
    "GatedFusion",
    "Joint",
    "Multimodal",
    "MultimodalNet",
    "SumFusion",
    "Unimodal",
    "arl_coefficients",
    "arl_loss",
    "concat_unimodal_logits",
    "make_net",
    "modality_scores",
    "ogm_coefficients",
    "scale_gradient",
]
