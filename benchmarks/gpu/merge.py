"""A model folder from a checkpoint of a training with LoRA that was stopped: WARM_START TRAINING STEP."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from data.contracts import read_json, write_json
from teacher.model import load_causal_lm, merge_adapters, save_model, stored_dtype, weights_fingerprint
from teacher.prompt import TEACHER_FILE


def main() -> None:
    from peft import PeftModel

    warm, training, step = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    dtype = stored_dtype(warm)
    model, tokenizer = load_causal_lm(warm, str(dtype).removeprefix("torch."))
    model = merge_adapters(PeftModel.from_pretrained(model, training / "checkpoints" / "agpo" / f"checkpoint-{step}"))
    building = training / "building"
    save_model(model, tokenizer, building)
    for path in warm.iterdir():  # the prompt and what else makes a model folder a teacher
        if not (building / path.name).exists() and path.suffix != ".safetensors":
            shutil.copyfile(path, building / path.name)
    record = read_json(building / TEACHER_FILE)
    write_json(building / TEACHER_FILE, record | {"fingerprint": weights_fingerprint(building)})
    building.rename(training / "model")


if __name__ == "__main__":
    main()
