"""Student and teacher: where they come from, how they are held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .ranges import NOT_NEGATIVE, POSITIVE
from .units import COLUMN, FILE, MODEL, NAME, NUMBER, SECONDS, WHOLE


@dataclass(frozen=True)
class ModelSettings:
    """Student and teacher: where they come from, how they are held."""

    student: Annotated[str, MODEL] = ""
    """The causal language model to train: hub id or folder. Or `builtin:arithmetic-student`,
    `builtin:arithmetic-shortcut-student`, `builtin:smollm2`, `builtin:smollm2-pruned-student`."""
    teacher: Annotated[str, MODEL] = ""
    """The causal language model to stay close to: hub id or folder. Or `builtin:arithmetic-teacher`,
    `builtin:smollm2`. Or one that is asked: `served:http://HOST:PORT` or `served:unix:/SOCKET` (`cmdp-fast
    teacher`), `vllm:http://HOST:PORT`, `cached:FOLDER` (`cmdp-fast cache-teacher`)."""
    teacher_column: Annotated[str, COLUMN] = ""
    """Column with the name of a problem's teacher, of several: `--teacher NAME=TEACHER NAME=TEACHER`, each of
    them as here: one that is asked, or a folder, a hub id or a built-in model, which is loaded."""
    teacher_timeout: Annotated[float, POSITIVE, SECONDS] = 600.0
    """Seconds that a teacher on a server may take for an answer."""
    teacher_token_file: Annotated[str, FILE] = ""
    """File with the word that a served teacher wants to hear."""
    teacher_wire: Literal["", "bfloat16", "float32", "int8"] = ""
    """What a served teacher's hidden states are sent in. Empty: as it computes them."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Weights are read from safetensors files only, with either value."""
    mixed_precision: Literal["no", "bf16", "auto"] = "no"
    """Arithmetic of the models. no: float32. bf16: the student runs under autocast and weights that are not trained,
    the teacher's or those under an adapter, are held in bfloat16. For GPUs, and for processors that multiply in
    bfloat16; on others it is far slower than float32. auto: bf16 on a GPU that has it, and on a CPU where a product in
    it takes less than three quarters of the time of one in float32, as measured when the run begins; its settings have
    what it was."""
    lora_rank: Annotated[int, NOT_NEGATIVE, WHOLE] = 0
    """Train an adapter of this rank, and not all weights. The student's own stay as they are. If the teacher is the
    same model, its weights are shared. `student/` gets the merged model in float32, `student/adapter` the adapter. 0:
    train all weights."""
    lora_alpha: Annotated[float, POSITIVE, NUMBER] = 32.0
    """The adapter's part of the output is multiplied by this over the rank."""
    lora_target: Annotated[tuple[str, ...], NAME] = ("all-linear",)
    """Ends of the names of the modules that get an adapter, such as `q_proj v_proj`. `all-linear`: every linear layer
    but the head."""
    lora_modules_to_save: Annotated[tuple[str, ...], NAME] = ()
    """Ends of the names of layers that are trained whole beside the adapter, as copies, such as `lm_head` (peft's
    `modules_to_save`). A head that is tied to the embedding becomes one of its own."""
    teacher_device: Literal["", "cpu", "offload"] = ""
    """cpu: the teacher's layers are in the host's memory and computed there, its head is on the accelerator; it is
    asked like one on a server, and not sampled. offload: its layers are in the host's memory during the update, which
    has its head alone and its outputs; those that do not fit `teacher_cache_mb` are kept in the host's memory too, and
    not computed again. Empty: on the accelerator."""
    teacher_quantization: Literal["", "bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8"] = ""
    """Quantise the teacher's layers as they are loaded, with the package of that name (4bit: NF4). How far it is from
    the full teacher, in nats on a few prompts, is said before the training. The file that is read is the full one."""
