"""Stage gate: does the measured expert keep its template's claim? Fails by name and amount.

A stage of its own, after score: a claim that fails is not measured again, and stops this expert alone.
Reads eval.json, the template's `gate` and the profile's `gates`; writes experts/<expert>/gate.json.
Run: dmoe gate <expert>
"""

from typing import Any

from factory.errors import UserError, relative
from factory.paths import Home, Profile
from factory.store import need, read_json, write_json
from factory.template import Template, read_template


def gate(home: Home, expert: str, profile: Profile) -> dict[str, Any]:
    """Holds the lower ends of the 95 % intervals against the template's gate.

    Raises:
        UserError: every gate that is missed, by name and amount; nothing is written.
    """
    template = read_template(home.template(expert))
    path = need(home.expert(expert, "eval.json"), f"dmoe score {expert}")
    if "robustness" not in (measured := read_json(path)):
        raise UserError(f"{relative(path)}: measured by an older dmoe\n  then run: dmoe score {expert}")
    found = judge(measured, template, profile.gates)
    missed = [name for name, g in found.items() if g["gated"] and not g["passed"]]
    if missed:
        lines = [
            f"{name} {found[name]['low']:.3f} at the lower end, {found[name]['wanted']:g} wanted" for name in missed
        ]
        sql = f"SELECT * FROM scores WHERE expert = '{expert}' AND panel = 'claim' AND arm = 'expert' AND NOT mention"
        look = f'dmoe query "{sql}", or dmoe query robustness'
        raise UserError(f"{expert}: gate missed: {'; '.join(lines)}\n  then look at the replies: {look}")
    write_json(home.expert(expert, "gate.json"), found)
    return found


def judge(measured: dict[str, Any], template: Template, gates: list[str]) -> dict[str, dict[str, Any]]:
    """For each gate of the template: what was wanted, the lower end measured, whether it counts, whether it passed."""
    declared = template.declaration.gate
    places = {
        "mention": ("mention", declared.mention),
        "right": ("right", declared.right),
        "form": ("in_form", declared.form),
    }
    found = {}
    for name, (measure, wanted) in places.items():
        low = measured["expert"][measure]["low"]
        found[name] = {"wanted": wanted, "low": low, "gated": name in gates, "passed": low >= wanted}
    worst = min(figures["mention"]["low"] for figures in measured["robustness"].values())
    for name, low in (("robust", worst), ("length_ratio", measured["length_ratio"]["low"])):
        wanted = getattr(declared, name)
        found[name] = {"wanted": wanted, "low": low, "gated": name in gates, "passed": low >= wanted}
    return found
