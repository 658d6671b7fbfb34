"""A process reward model: a trunk of any architecture and a value head with a hidden layer.

`selfplay export --format prm-model` copies this file into the folders it writes, where transformers finds it through
the config's `auto_map`; hence it imports nothing of this project. Load such a folder with
`AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput


class ValuePrmConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped
    """`trunk`: the trunk's own config, as a dict with its `model_type`; `value_width`: GELU units of the head."""

    model_type = "selfplay_value_prm"

    def __init__(self, trunk: dict[str, Any] | None = None, value_width: int = 64, **kwargs: Any) -> None:
        self.trunk = trunk
        self.value_width = value_width
        super().__init__(**kwargs)


class ValuePrm(PreTrainedModel):  # type: ignore[misc]
    """Logits [B, T, 1]; the sigmoid at a step's last token is the chance that the episode is won from there."""

    config_class = ValuePrmConfig
    base_model_prefix = "model"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        trunk = dict(config.trunk)
        self.model = AutoModel.from_config(AutoConfig.for_model(trunk.pop("model_type"), **trunk))
        size = self.model.config.hidden_size
        self.score = nn.Sequential(nn.Linear(size, config.value_width), nn.GELU(), nn.Linear(config.value_width, 1))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """input_ids [B, T]; further arguments go to the trunk."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return TokenClassifierOutput(logits=self.score(hidden))
