"""The command line, in TRL's style: its arguments and ours, in a YAML file or as options.

    python -m cmdp_fast.integrations.trl [grpo | distillation] --config settings.yaml [--option value ...]

`--help` lists them all. A mistake of the user's is told in one line on stderr, with exit code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cmdp_fast.errors import InputError, first_line
from cmdp_fast.masking import told
from cmdp_fast.reward_functions import import_reward

from .version import require_trl

COMMANDS = ("grpo", "distillation")
BUILT_IN = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; returns the exit code: 0, 2 for a mistake of the user's, 130 for an interrupt."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words.pop(0) if words and not words[0].startswith("-") else "grpo"
    try:
        if command not in COMMANDS:
            raise InputError(f"unknown command {command!r}; expected one of {', '.join(COMMANDS)}")
        require_trl()
        trainer = _trainer(command, words)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.save_model(trainer.args.output_dir)
    except (InputError, ImportError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"cmdp_fast.integrations.trl: error: {told(first_line(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cmdp_fast.integrations.trl: interrupted", file=sys.stderr)
        return 130
    return 0


def _trainer(command: str, words: list[str]) -> Any:
    """The trainer that the settings ask for, about to begin."""
    from trl import get_peft_config, get_quantization_config

    from . import CMDPDistillationTrainer, CMDPGRPOTrainer

    script, args, model, mixture = parse(command, words)
    options = {
        "revision": model.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    args.model_init_kwargs = options | (args.model_init_kwargs or {})
    if not model.model_name_or_path:
        raise InputError("model_name_or_path is missing: the student's hub id or folder")
    functions: list[Any] = [reward_function(name) for name in script.reward_funcs or []]
    if script.reward_model_name_or_path:
        functions.append(script.reward_model_name_or_path)
    if command == "grpo" and not functions:
        raise InputError("reward_funcs is missing: names of TRL's, module.function, or module:function")
    build = CMDPGRPOTrainer if command == "grpo" else CMDPDistillationTrainer
    try:
        train, evaluation = _datasets(script, mixture, args)
        return build(
            model.model_name_or_path,
            args=args,
            reward_funcs=functions,
            train_dataset=train,
            eval_dataset=evaluation,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    except (ValueError, OSError, KeyError) as error:  # of TRL, transformers and datasets, about their arguments
        raise InputError(first_line(error)) from error


def parse(command: str, words: list[str]) -> tuple[Any, ...]:
    """(script arguments, configuration, model arguments, dataset mixture) of a command line.

    Raises InputError for a file that is not there or not valid, for settings that do not exist and for wrong values.
    """
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser
    from trl.scripts.grpo import GRPOScriptArguments

    from . import CMDPDistillationConfig, CMDPGRPOConfig

    class Parser(TrlParser):
        def error(self, message: str) -> Any:  # argparse would print the usage, some hundred lines
            raise InputError(message)

    config = CMDPGRPOConfig if command == "grpo" else CMDPDistillationConfig
    kinds = (GRPOScriptArguments, config, ModelConfig, DatasetMixtureConfig)
    parser = Parser(kinds, prog=f"python -m cmdp_fast.integrations.trl {command}", allow_abbrev=False)
    _check_names(parser, words)
    try:
        return parser.parse_args_and_config(words)
    except (ValueError, OSError, TypeError) as error:
        raise InputError(first_line(error)) from error


def _check_names(parser: Any, words: list[str]) -> None:
    """Raises InputError for a settings file that cannot be read, and for settings that do not exist."""
    import yaml

    options = list(words)
    settings: Any = {}
    if "--config" in options:
        place = options.index("--config")
        if place + 1 == len(options):
            raise InputError("--config needs the path of a YAML file")
        _, path = options.pop(place), options.pop(place)
        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"--config {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(settings, dict):
            raise InputError(f"--config {path}: expected names and values, found a {type(settings).__name__}")
    known, unknown = parser.parse_known_args(options)
    unknown += [name for name in settings if name not in vars(known) and name != "env"]
    if unknown:
        raise InputError(f"there is no setting named {unknown[0]}")


def reward_function(name: str) -> Callable[..., Any]:
    """One of TRL's reward functions by its name, or the user's by ``module.function`` or ``module:function``; a class
    stands for an object of it."""
    if name in BUILT_IN:
        from trl import rewards

        function: Callable[..., Any] = getattr(rewards, name)
        return function
    if ":" not in name and "." in name:
        module, _, function_name = name.rpartition(".")
        name = f"{module}:{function_name}"
    return import_reward("reward_funcs", name, BUILT_IN)


def _datasets(script: Any, mixture: Any, args: Any) -> tuple[Any, Any]:
    """(training split, evaluation split or None) of the dataset that the settings name."""
    from datasets import load_dataset
    from trl import get_dataset

    if bool(mixture.datasets) == bool(script.dataset_name):
        raise InputError("give exactly one of dataset_name and datasets")
    if mixture.datasets:
        splits = get_dataset(mixture)
    else:
        splits = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    wanted = [script.dataset_train_split]
    if args.eval_strategy != "no":
        wanted.append(script.dataset_test_split)
    for split in wanted:
        if split not in splits:
            raise InputError(f"there is no split {split!r} in the dataset, only {', '.join(splits)}")
    chosen = [splits[split] for split in wanted]
    if "prompt" not in (chosen[0].column_names or ["prompt"]):
        raise InputError(f"the dataset needs a column 'prompt', it has {', '.join(chosen[0].column_names)}")
    return chosen[0], chosen[1] if len(chosen) > 1 else None


if __name__ == "__main__":
    sys.exit(main())
