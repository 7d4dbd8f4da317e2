"""`dmoe preview`: what a template and its seeds would become, judged as build would, before anything is written."""

import asyncio
from typing import Any

from factory.build import judge
from factory.checks import Counter
from factory.generate import of_seed
from factory.seeds import Seed, held_out
from factory.teacher import Teacher
from factory.teacher.phrases import PhrasesTeacher
from factory.template import Template

Row = dict[str, Any]  # a candidate's columns and its verdict's


def preview(
    template: Template, seeds: list[Seed], count: Counter, teacher: Teacher | None = None, only: set[str] | None = None
) -> list[Row]:
    """The candidates of `seeds` (of the ids in `only`, if given), each with its verdict; nothing is read or written.

    `teacher` None is the embedded one.
    """
    outside = held_out(seeds)
    teacher = teacher or PhrasesTeacher(template)
    asked = [seed for seed in seeds if only is None or seed.id in only]

    async def rows() -> list[Row]:
        made = await asyncio.gather(*(of_seed(template, s, teacher, count, s.id in outside) for s in asked))
        return [row for done in made for row in done.rows]

    candidates = asyncio.run(rows())
    return [{**c, **v} for c, v in zip(candidates, judge(candidates, template, count), strict=True)]
