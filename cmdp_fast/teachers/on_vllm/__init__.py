"""A teacher on a server of vLLM: its last hidden states, exact, or the log-probabilities of its k likeliest tokens.

    vllm serve Qwen/Qwen2.5-Math-7B --runner pooling --convert embed --pooler-config.task token_embed
    cmdp-fast train --teacher vllm:http://127.0.0.1:8000 …

`asked.py` is what a server is asked and what it may answer, `stored_head.py` the head, which such a server does not
have, out of the model's files, and `teacher.py` the two teachers.
"""

from .teacher import TeacherOnVLLM

__all__ = ["TeacherOnVLLM"]
