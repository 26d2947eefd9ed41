"""A teacher in a process of ours, which answers with its last hidden states as raw tensors over HTTP.

    cmdp-fast teacher --model Qwen/Qwen2.5-7B-Instruct --port 8765
    cmdp-fast train --teacher served:http://127.0.0.1:8765 …

`protocol.py` is what both sides say to each other, `tensors.py` how tensors are written, `server.py` and `batching.py`
the side with the model, `client.py` the other.
"""

from .client import ServedTeacher

__all__ = ["ServedTeacher"]
