"""Teachers that are asked: in this process, on a server, on disk, or several of them.

    teacher = open_teacher("served:http://10.0.0.2:8765", tokenizer)
    said = teacher.outputs(input_ids, attention_mask)      # hidden states [B, S, H], and what they took
    stats = cf.linear_token_stats(student_hidden, student_head, said.hidden, teacher.head, tokens)

A divergence needs of a teacher one tensor per token: its last hidden state (7 to 16 KB), from which the head makes all
of its logits, so that the divergence is exact; or the logits; or the log-probabilities of its k most likely tokens,
from which only bounds follow. The trainer of this package, those of TRL and a plain loop ask the same object.
"""
