"""The controller of ``kind="pid"`` as a callback whose state goes into the checkpoints of transformers' trainers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from cmdp_fast.errors import InputError
from cmdp_fast.objective import PIDController


class ConstraintController(TrainerCallback, ExportableState):
    """A `PIDController` that a checkpoint's `trainer_state.json` holds, and that a run which goes on takes from it.

    Gains are those of the run that goes on; with transformers' ``restore_callback_states_from_checkpoint`` those of the
    checkpoint.
    """

    def __init__(self, kp: float, ki: float, kd: float, initial_integral: float) -> None:
        self.arguments = {"kp": kp, "ki": ki, "kd": kd, "initial_integral": initial_integral}
        self.pid = PIDController(kp=kp, ki=ki, kd=kd, initial_integral=initial_integral)

    @property
    def numbers(self) -> dict[str, Any]:
        """The controller's state, plain numbers; setting it continues from there."""
        return self.pid.state_dict()

    @numbers.setter
    def numbers(self, state: dict[str, Any]) -> None:
        self.pid.load_state_dict(state)

    def state(self) -> dict[str, Any]:
        """As transformers writes it: arguments, and attributes that are set."""
        return {"args": self.arguments, "attributes": {"numbers": self.numbers}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raises InputError for a checkpoint of a run that had no controller."""
        if not state.global_step:
            return
        stored = state.stateful_callbacks.get(type(self).__name__)
        if stored is None:
            raise InputError(
                f"kind='pid': the checkpoint of step {state.global_step} holds no controller; expected one of a run "
                "with kind='pid'"
            )
        self.numbers = stored["attributes"]["numbers"]
