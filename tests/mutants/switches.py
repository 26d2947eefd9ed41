"""C++ sources with all of their mutants, of which a number chooses one when they run: one build serves all."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lists import Mutant, Span

VARIABLE = "CMDP_MUTANT"  # of the environment: the number at the start
DECLARED = 'extern "C" __attribute__((visibility("default"))) int cmdp_mutant;\n'
DEFINED = f"""
#include <cstdlib>
extern "C" {{ __attribute__((visibility("default"))) int cmdp_mutant = 0; }}
__attribute__((constructor(101))) static void choose_mutant() {{  // before all that a module does when it is loaded
  if (const char* chosen = std::getenv("{VARIABLE}")) cmdp_mutant = std::atoi(chosen);
}}
"""

Numbered = tuple[int, Mutant]  # the number that chooses it, among all of a build


def switched(text: str, mutants: Sequence[Numbered]) -> str:
    """A source with these of its mutants that are in it. Raises ValueError for two that overlap."""
    choices: dict[Span, list[Numbered]] = {}
    for number, mutant in mutants:
        if span := mutant.choice(text):
            choices.setdefault(span, []).append((number, mutant))
    out, last = DECLARED, 0
    for span, here in sorted(choices.items()):
        if span.begin < last:
            raise ValueError(f"mutant {here[0][1].number} overlaps another: give each the `function` that it stands in")
        out, last = out + text[last : span.begin] + _choice(text[span.begin : span.end], here), span.end
    return out + text[last:]


def _choice(old: str, mutants: list[Numbered]) -> str:
    number, first = mutants[0]
    if first.function:
        return _functions(old, first.function, mutants)
    if first.kind == "raw":
        return first.new.replace("@", f"cmdp_mutant == {number}")
    if first.kind == "statement":
        return "".join(f"if (cmdp_mutant == {n}) {{ {mutant.new} }} else " for n, mutant in mutants) + f"{{ {old} }}"
    return "(" + "".join(f"cmdp_mutant == {n} ? ({mutant.new}) : " for n, mutant in mutants) + f"({old}))"


def _functions(old: str, head: str, mutants: list[Numbered]) -> str:
    """A copy of a function for each mutant, and before its own first statement the call of the one that is chosen."""
    name, _, parameters = head.partition("(")
    name = name.split()[-1]
    arguments = ", ".join(re.findall(r"(\w+)\s*[,)]", parameters))
    copies = calls = ""
    for number, mutant in mutants:
        copies += f"__attribute__((noinline)) {mutant.applied(old).replace(f'{name}(', f'{name}_{number}(', 1)}\n"
        calls += f"if (cmdp_mutant == {number}) return {name}_{number}({arguments});\n"
    return copies + head + calls + old[len(head) :]
