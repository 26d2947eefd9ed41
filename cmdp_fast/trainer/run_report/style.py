"""How the page looks: one style sheet for wide and narrow, light and dark."""

from __future__ import annotations

from .plot import COLOURS, DARK, LIGHT

# Costs of a token: the background of each level, and the ink on it; one hue, told apart by lightness. Where no line
# says so, the ink is that of the text.
_LEVELS_LIGHT = ("transparent", "#fdeed3", "#fbd59b", "#f7b267", "#ee8a45", "#e26136")
_LEVELS_DARK = ("transparent", "#33271a", "#533818", "#784616", "#9b4f13", "#bd520e")

STYLE = f"""
:root {{
  color-scheme: light dark;
  --paper: {LIGHT.paper}; --text: {LIGHT.text}; --line: #e6e3dd; --soft: #faf8f5; --quiet: #6a665f;
  --over: #a61b1b; --within: #14623f; --on-over: #ffffff; --deep: {LIGHT.text};
  {" ".join(f"--k{level}: {colour};" for level, colour in enumerate(_LEVELS_LIGHT))}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --paper: {DARK.paper}; --text: {DARK.text}; --line: #303136; --soft: #1d1e22; --quiet: #a5a29b;
    --over: #ff8f85; --within: #77cfa2; --on-over: #2a0705; --deep: #ffffff;
    {" ".join(f"--k{level}: {colour};" for level, colour in enumerate(_LEVELS_DARK))}
  }}
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0; background: var(--paper); color: var(--text);
  font: 16px/1.6 system-ui, sans-serif; overflow-wrap: anywhere;
}}
main {{ max-width: 86rem; margin: 0 auto; padding: 3rem 2.5rem 5rem; }}
h1 {{ font-size: 1.9rem; line-height: 1.25; font-weight: 650; margin: 0 0 .4rem; }}
h2 {{ font-size: 1.25rem; font-weight: 650; margin: 3.5rem 0 .75rem; }}
h3 {{ font-size: .85rem; font-weight: 600; margin: 0; color: var(--quiet); }}
p {{ margin: .5rem 0; max-width: 48rem; }}
.lead, .note {{ color: var(--quiet); }}
.note {{ font-size: .9rem; }}
figure {{ margin: 0; overflow-x: auto; }}
figcaption {{ max-width: 48rem; margin-top: .5rem; }}
figure img {{ display: block; width: 100%; max-width: 50rem; min-width: 30rem; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
th, td {{ padding: .5rem 1.1rem .5rem 0; text-align: right; border-bottom: 1px solid var(--line); }}
td {{ white-space: nowrap; }}
thead th {{ font-weight: 500; font-size: .85rem; line-height: 1.3; color: var(--quiet); vertical-align: bottom; }}
tbody th {{ font-weight: 500; text-align: left; min-width: 15rem; max-width: 24rem; overflow-wrap: anywhere; }}
th:first-child {{ position: sticky; left: 0; background: var(--paper); }}
.dot {{
  display: inline-block; width: .65em; height: .65em; margin-right: .5em; border-radius: 50%; background: var(--quiet);
}}
{" ".join(f".m{number} {{ background: {colour}; }}" for number, colour in enumerate(COLOURS))}
.legend {{ display: flex; flex-wrap: wrap; gap: .4rem 1.1rem; margin: 1rem 0 0; padding: 0; list-style: none; }}
.legend li {{ font-size: .9rem; color: var(--quiet); }}
.swatch {{
  display: inline-block; width: 1.5em; height: 1.1em; margin-right: .45em; vertical-align: -.15em;
  border: 1px solid var(--line); border-radius: 3px;
}}
.prompt {{ margin: 2.5rem 0 0; padding: 1.5rem 0 0; border-top: 1px solid var(--line); }}
.ask {{ margin: .3rem 0 1.1rem; font-size: 1.05rem; white-space: pre-wrap; overflow: hidden; }}
.role {{ color: var(--quiet); font-size: .85rem; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 14.5rem), 1fr)); gap: 1rem; }}
.cell {{
  display: flex; flex-direction: column; min-width: 0; padding: .9rem 1.1rem; overflow: hidden;
  background: var(--soft); border: 1px solid var(--line); border-radius: 10px;
}}
.text {{
  flex: 1; margin: .5rem 0 .9rem; white-space: pre-wrap; line-height: 1.75; tab-size: 4; overflow: hidden;
}}
.facts {{ margin: 0; font-size: .85rem; line-height: 1.5; color: var(--quiet); font-variant-numeric: tabular-nums; }}
.over {{ color: var(--over); font-weight: 650; }}
.within {{ color: var(--within); font-weight: 600; }}
.cut, .open {{ color: var(--text); font-weight: 600; }}
.more, .end {{ color: var(--quiet); }}
{" ".join(f".k{level} {{ background: var(--k{level}); }}" for level in range(len(_LEVELS_LIGHT)))}
.k4, .k5 {{ color: var(--deep); }}
.text span, .text mark {{ padding: .15em 0; border-radius: 2px; }}
mark {{ color: inherit; outline: 2px solid var(--over); outline-offset: -1px; }}
mark::before, .key::before {{
  content: "▶"; margin: 0 .2em 0 0; padding: .25em .35em; font-size: .7em; vertical-align: .1em;
  color: var(--on-over); background: var(--over);
}}
mark ~ span {{ text-decoration: underline dotted var(--over) 2px; text-underline-offset: .25em; }}
@media (max-width: 700px) {{
  main {{ padding: 1.75rem 1.1rem 3rem; }}
  h1 {{ font-size: 1.5rem; }}
  .grid {{ grid-template-columns: 1fr; }}
  tbody th {{ min-width: 8.5rem; }}
}}
"""
