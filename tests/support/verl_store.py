"""verl's trainer on the controller without Ray: a dict stands in for TransferQueue."""

from __future__ import annotations

from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu
from verl_batch import RESPONSES, Batch, composed, engine_outputs, loss_function, nested, padded

import cmdp_fast.integrations.verl as integration

UID = ["a", "b", "a", "b"]


class Store:
    """TransferQueue's place: fields of all rows, by name."""

    def __init__(self, fields: dict) -> None:
        self.fields, self.written = fields, {}

    def kv_batch_get(self, keys, partition_id, select_fields) -> TensorDict:
        data = TensorDict({name: self.fields[name] for name in select_fields if name in self.fields}, len(keys))
        if "uid" in select_fields:
            data["uid"] = tu.NonTensorStack(*self.fields["uid"])
        return data

    def kv_batch_put(self, keys, partition_id, fields):
        self.written.update(fields.items())
        return KVBatchMeta(partition_id=partition_id, keys=keys, tags=[{}] * len(keys))


def trainer_and_store(
    monkeypatch: Any, batch: Batch, *overrides: str
) -> tuple[integration.ConstrainedTrainer, Store, Tensor]:
    """A trainer that has not been set up, the queue it reads, and what the scoring pass has put there."""
    config = composed("algorithm.cmdp.budget=4.0", *overrides)
    data = batch.data()
    outputs = engine_outputs(batch, data, loss_function(config), batch.student)
    rewards = [torch.zeros(r).index_fill(0, torch.tensor(r - 1), i) for i, r in enumerate(RESPONSES)]
    store = Store({**dict(data.items()), **outputs, "rm_scores": nested(rewards), "uid": UID})
    monkeypatch.setattr(tq, "kv_batch_get", store.kv_batch_get)
    monkeypatch.setattr(tq, "kv_batch_put", store.kv_batch_put)
    return integration.ConstrainedTrainer(config), store, padded(rewards)


def meta() -> KVBatchMeta:
    return KVBatchMeta(partition_id="train", keys=[f"{uid}_{i}_0" for i, uid in enumerate(UID)], tags=[{}] * 4)
