"""`HuggingFace`: a causal language model of transformers, by name, path or config."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from metadist.checks.values import require_word
from metadist.factory import ModelFactory
from metadist.models import rematerialise
from metadist.tasks.language.hub import from_hub, require

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class HuggingFace(ModelFactory):
    """A causal language model of transformers, which travels by its name.

        HuggingFace("gpt2", lora={"r": 8})
        HuggingFace({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, ...})

    It is built once in a process, from the local cache where it is there, and in eval mode, so
    without dropout. Code that comes with a model is never run.

    Args:
        model: A name on the hub, a folder, or a config (of transformers, or as a dict with its
            `model_type`), whose weights are then drawn from `seed`.
        lora: Arguments of `peft.LoraConfig`: the base is frozen, and low-rank matrices, drawn from
            `seed`, are the inner variable; None: no LoRA.
        trainable: Patterns of names of parameters, such as "*.layers.11.*": all others are frozen;
            None: all are trained, or those of LoRA.
        dtype: That of the weights. What is trained needs float32 (or float64); with LoRA the frozen
            base may be in "bfloat16".
        precision: "bf16": the model runs under autocast in bfloat16, and its losses, the weights
            and x are in float32; "float32": no autocast.
        revision: A tag or commit on the hub.
        local_files_only: Whether to look in the cache only.
        rematerialise: Whether the blocks of the model keep their inputs only, see
            `metadist.models.rematerialise`.
        seed: Of what is drawn, 0 <= seed < 2^64.
        trust_remote_code: Must be False.

    Raises:
        ValueError: An argument out of its range. When it is built: no such model within reach, a
            pattern that matches nothing, transformers or peft missing.
    """

    def __init__(
        self,
        model: Any,
        lora: Mapping[str, Any] | None = None,
        trainable: str | Sequence[str] | None = None,
        dtype: Literal["float32", "float64", "bfloat16"] = "float32",
        precision: Literal["float32", "bf16"] = "float32",
        revision: str | None = None,
        local_files_only: bool = False,
        rematerialise: bool = False,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        if trust_remote_code:
            raise ValueError(
                "trust_remote_code must be False, got True: code from the net would run on every "
                "worker. Use a model of a type that transformers knows, or build it in a function "
                "of your own and give ModelFactory its name"
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if dtype == "bfloat16" and lora is None:
            raise ValueError(
                "dtype must be 'float32' for weights that are trained, got 'bfloat16': steps "
                "are smaller than its rounding. Pass precision='bf16', or freeze the base by lora="
            )
        if precision not in ("float32", "bf16"):
            raise ValueError(f"precision must be 'float32' or 'bf16', got {precision!r}")
        if lora is not None and lora.get("lora_dropout", 0) > 0:
            raise ValueError(
                f"dropout must be off in the inner loop, got lora_dropout={lora['lora_dropout']}: "
                "its random mask could not be replayed for second derivatives; leave it out"
            )
        if lora is not None and trainable is not None:
            raise ValueError(
                "trainable must be None with lora, which says what is trained, got both: choose "
                "layers by lora={'target_modules': ...}"
            )
        require_word("seed", seed)
        if hasattr(model, "to_dict"):
            model = {**model.to_dict(), "model_type": model.model_type}
        if isinstance(model, nn.Module) or not isinstance(model, str | Path | Mapping):
            raise ValueError(
                f"model must be a name, a folder or a config, got {type(model).__name__}: a module "
                "goes to LanguageModelProblem as it is"
            )
        for field, flag in (
            ("rematerialise", rematerialise),
            ("local_files_only", local_files_only),
        ):
            if not isinstance(flag, bool):
                raise ValueError(f"{field} must be True or False, got {flag!r}")
        if isinstance(model, Mapping) and "model_type" not in model:
            raise ValueError(
                f"model must have a model_type where it is a config, got {', '.join(model)}: add "
                "'model_type': 'llama', say"
            )
        self.model = dict(model) if isinstance(model, Mapping) else str(model)
        self.lora = None if lora is None else dict(lora)
        self.trainable = [trainable] if isinstance(trainable, str) else trainable
        self.dtype, self.precision, self.revision = dtype, precision, revision
        self.local_files_only, self.rematerialise = local_files_only, rematerialise
        self.seed, self.trust_remote_code = seed, trust_remote_code
        self.key()

    def make(self) -> nn.Module:
        transformers = require("transformers")
        model: nn.Module = self._base(transformers)
        config: Any = model.config
        config.use_cache = False
        if self.lora is not None:
            model = with_lora(model, {"task_type": "CAUSAL_LM", **self.lora})
        elif self.trainable is not None:
            _freeze(model, self.trainable)
        model.eval()
        return rematerialise(model) if self.rematerialise else model

    def _base(self, transformers: Any) -> Any:
        auto, options = transformers.AutoModelForCausalLM, {"dtype": DTYPES[self.dtype]}
        if isinstance(self.model, str):
            return from_hub(
                "model",
                self.model,
                auto.from_pretrained,
                revision=self.revision,
                local_files_only=self.local_files_only,
                **options,
            )
        fields = dict(self.model)
        kind = fields.pop("model_type")
        try:
            config = transformers.AutoConfig.for_model(kind, **fields)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"model must be a config that transformers knows, got model_type={kind!r}: {error}"
            ) from error
        return auto.from_config(config, **options)

    def __repr__(self) -> str:
        name = self.model if isinstance(self.model, str) else self.model["model_type"]
        return f"HuggingFace({name!r})" if self.lora is None else f"HuggingFace({name!r}, lora)"


def with_lora(model: nn.Module, lora: Mapping[str, Any]) -> nn.Module:
    """The model with its weights frozen and low-rank matrices, in float32 at least, to train.

    Args:
        model: Of transformers.
        lora: Arguments of `peft.LoraConfig`.

    Raises:
        ValueError: Other arguments; peft is missing.
    """
    peft = require("peft")
    with warnings.catch_warnings():  # of deprecated names that peft itself asks for
        warnings.simplefilter("ignore")
        try:
            config = peft.LoraConfig(**{"lora_dropout": 0.0, **lora})
            adapted: nn.Module = peft.get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"lora must be arguments of peft.LoraConfig, got {lora}: {error}"
            ) from error
    for leaf in adapted.parameters():
        if leaf.requires_grad:  # what is trained is never rounded to bfloat16
            leaf.data = leaf.data.to(torch.promote_types(leaf.dtype, torch.float32))
    return adapted


def _freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let those parameters alone be trained whose names match a pattern."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"trainable must match names of parameters, {pattern!r} matches none of "
                f"{', '.join(names[:6])} ..."
            )
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
