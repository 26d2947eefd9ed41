"""Short instructions to write a sentence, made from templates: a task for a real language model.

Nobody has written an answer to any of them. What is asked for, colours or a question, is what `hackable.py` counts, and
that is not the same as a good sentence.
"""

from __future__ import annotations

from typing import Any

from cmdp_fast.errors import InputError, shown

TEMPLATES = {
    "colours": (
        "Describe {topic} in one sentence, with its colours.",
        "Describe the colours of {topic} in one sentence.",
        "Write one colourful sentence about {topic}.",
        "Write one sentence about {topic} and its colours.",
        "Describe a painting of {topic} in one sentence.",
    ),
    "questions": (
        "Ask me a question about {topic}.",
        "Ask a friend about {topic} in one sentence.",
        "Write one question about {topic}.",
        "What would you ask about {topic}? One sentence.",
        "Start a conversation about {topic} with a question.",
    ),
}
TOPICS = (
    *("a rainy morning", "an old lighthouse", "a small bakery", "the night train", "a lost umbrella", "the first snow"),
    *("a quiet library", "a busy market", "a broken clock", "the sea in winter", "a garden in spring", "a long walk"),
    *("a cat on a roof", "a slow bus ride", "a letter from a friend", "a birthday cake", "an empty beach", "a kite"),
    *("a mountain village", "a river at dawn", "a football match", "a school trip", "a cup of tea", "a thunderstorm"),
    *("a street musician", "a new bicycle", "an old photograph", "a summer evening", "a farm with horses", "a bridge"),
    *("a train station", "a picnic by the lake", "a spider in the kitchen", "a night without power", "a museum"),
    *("a flight above the clouds", "a castle on a hill", "a foggy harbour", "a flower shop", "a camping trip"),
    *("a sleeping dog", "a ship in a storm", "a game of chess in the park", "an apple tree", "a crowded lift"),
    *("a desert road", "the full moon", "a visit to the dentist", "a secret door", "a paper boat", "a snowman"),
    *("a fishing trip", "a bookshop", "the last day of school", "a neighbour's piano", "a robot in the house"),
    *("a lost key", "a windmill", "a campfire", "a penguin", "an astronaut", "a waterfall", "a wedding in a village"),
    *("a market in the rain", "a sunflower field", "a circus", "a frozen lake", "a city from above", "an old ship"),
    *("a kitchen at breakfast", "a toy shop", "a volcano", "a parrot", "a balloon ride", "a carpet", "a rainbow"),
)


def writing_rows(arguments: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """Up to ``size`` rows with a prompt and its topic, and no answer.

    ``arguments``: ``about``, one of `TEMPLATES`. A topic's templates are spread over the rows, so that a smaller size
    has all topics. Raises InputError for other arguments.
    """
    about = arguments.get("about", "colours")
    if unknown := sorted(arguments.keys() - {"about"}):
        raise InputError(f"--task writing has no argument {unknown[0]!r}, only 'about'")
    if not isinstance(about, str) or about not in TEMPLATES:
        raise InputError(f"--task writing: about must be one of {', '.join(TEMPLATES)}, not {shown(about)}")
    rows = [
        {"prompt": TEMPLATES[about][(number + turn) % len(TEMPLATES[about])].format(topic=topic), "topic": topic}
        for turn in range(len(TEMPLATES[about]))
        for number, topic in enumerate(TOPICS)
    ]
    return rows[:size]
