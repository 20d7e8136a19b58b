"""The real model takes the fast path: its weights are mapped from one file, side by side."""

from shikomi.adapters.lora import Lora
from shikomi.model.load import load_model


def test_smollm2_is_fused_and_nothing_is_said_of_a_slower_path(smollm2_folder):
    lm = load_model(str(smollm2_folder), Lora(r=2, target_modules=["q_proj"]))
    assert lm.path == "fused" and lm.path_reason == "" and not lm.notes
