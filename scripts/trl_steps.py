"""Two optimiser steps of a TRL trainer on an exported file; run by tests/selfplay/test_trl.py in TRL's environment.

Imports nothing of this project. Prints one JSON object: TRL's version, the steps made, the losses, and whether the
weights moved.

Usage: python trl_steps.py sft|dpo|prm DATA MODEL SCRATCH
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import trl
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

STEPS = 2


def main(kind: str, data: str, folder: str, scratch: str) -> None:
    loader = "parquet" if data.endswith(".parquet") else "json"
    rows = load_dataset(loader, data_files=data, split="train", cache_dir=scratch + "/cache")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    common: dict[str, Any] = {
        "output_dir": scratch,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    if kind == "prm":
        from trl.experimental.prm import PRMConfig, PRMTrainer

        model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=2)
        trainer = PRMTrainer(
            model, PRMConfig(step_separator=";", **common), train_dataset=rows, processing_class=tokenizer
        )
    else:
        config, maker = {"sft": (trl.SFTConfig, trl.SFTTrainer), "dpo": (trl.DPOConfig, trl.DPOTrainer)}[kind]
        model = AutoModelForCausalLM.from_pretrained(folder)
        trainer = maker(model=model, args=config(**common), train_dataset=rows, processing_class=tokenizer)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        json.dumps(
            {
                "trl": trl.__version__,
                "trainer": type(trainer).__name__,
                "rows": len(rows),
                "steps": trainer.state.global_step,
                "losses": losses,
                "moved": bool((before != after).any()),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
