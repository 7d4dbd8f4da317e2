"""The named queries of `dmoe query`: for each what it answers, and its SQL over the views of factory/query.py."""

QUERIES: dict[str, tuple[str, str]] = {
    "rows-per-answer": ("how many rows each answer has, of how many seeds", """
        SELECT expert, answer, count(*) FILTER (split = 'train') AS train,
               count(*) FILTER (split = 'holdout') AS holdout, count(DISTINCT seed_id) AS seeds
        FROM rows GROUP BY ALL ORDER BY expert, answer"""),
    "drop-reasons": ("why candidates fell: how many, how many for that reason alone, an example", """
        WITH told AS (SELECT expert, unnest(reasons) AS reason, len(reasons) = 1 AS alone, detail FROM verdicts)
        SELECT expert, reason, count(*) AS candidates, count_if(alone) AS by_it_alone, min(detail) AS example
        FROM told GROUP BY ALL ORDER BY expert, candidates DESC, reason"""),
    "longest": ("the 20 longest kept replies, in the base's tokens", """
        SELECT expert, row_id, v.tokens, r.output FROM rows r JOIN verdicts v USING (expert, row_id)
        ORDER BY v.tokens DESC, row_id LIMIT 20"""),
    "shortest": ("the 20 shortest kept replies, in the base's tokens", """
        SELECT expert, row_id, v.tokens, r.output FROM rows r JOIN verdicts v USING (expert, row_id)
        ORDER BY v.tokens, row_id LIMIT 20"""),
    "most-alike": ("the 20 most alike questions that are no exact copies, and their score", """
        WITH alike AS (
            SELECT expert, row_id, "like", score FROM pairs
            UNION ALL SELECT expert, row_id, "like", score FROM verdicts WHERE "like" <> '')
        SELECT a.expert, round(max(a.score), 1) AS score, a.row_id, any_value(c.instruction) AS instruction, a."like",
               any_value(l.instruction) AS like_instruction
        FROM alike a JOIN candidates c USING (expert, row_id)
        JOIN candidates l ON l.expert = a.expert AND l.row_id = a."like"
        WHERE a.score < 100 GROUP BY a.expert, a.row_id, a."like" ORDER BY max(a.score) DESC, a.row_id LIMIT 20"""),
    "seeds-that-give-nothing": ("seeds without a single row, and why their candidates fell", """
        WITH fell AS (
            SELECT c.expert, c.seed_id, count(*) AS candidates,
                   list_sort(list_distinct(flatten(list(v.reasons)))) AS reasons
            FROM candidates c JOIN verdicts v USING (expert, row_id) GROUP BY ALL)
        SELECT s.expert, s.id, s.answer, f.candidates, f.reasons, s.instruction
        FROM seeds s JOIN fell f ON f.expert = s.expert AND f.seed_id = s.id
        WHERE NOT EXISTS (FROM rows r WHERE r.expert = s.expert AND r.seed_id = s.id) ORDER BY s.expert, s.id"""),
    "seeds-that-give-few": ("the 20 seeds with the fewest rows, of those that give any", """
        SELECT r.expert, r.seed_id, r.split, count(*) AS rows, any_value(s.instruction) AS seed
        FROM rows r LEFT JOIN seeds s ON s.expert = r.expert AND s.id = r.seed_id
        GROUP BY ALL ORDER BY rows, r.expert, r.seed_id, r.split LIMIT 20"""),
    "seeds-that-give-most": ("the 20 seeds with the most rows", """
        SELECT r.expert, r.seed_id, r.split, count(*) AS rows, any_value(s.instruction) AS seed
        FROM rows r LEFT JOIN seeds s ON s.expert = r.expert AND s.id = r.seed_id
        GROUP BY ALL ORDER BY rows DESC, r.expert, r.seed_id, r.split LIMIT 20"""),
    "tokens-spent": ("the teacher's tokens, and what a kept row has cost of them", """
        SELECT c.expert, c.teacher, sum(c.prompt_tokens) AS prompt_tokens,
               sum(c.completion_tokens) AS completion_tokens, count_if(v.verdict = 'keep') AS kept,
               round(sum(c.prompt_tokens + c.completion_tokens) / nullif(kept, 0), 1) AS per_kept_row
        FROM candidates c LEFT JOIN verdicts v USING (expert, row_id) GROUP BY ALL ORDER BY ALL"""),
    "wrong-answers": ("held-out questions that the expert did not answer rightly, with its reply", """
        SELECT expert, row_id, answer, instruction, reply, mention, in_form
        FROM scores WHERE panel = 'claim' AND arm = 'expert' AND NOT "right" ORDER BY expert, answer, row_id"""),
    "replies-by-arm": ("what base and expert replied to the same held-out question", """
        SELECT expert, row_id, instruction, max(reply) FILTER (arm = 'base') AS base,
               max(reply) FILTER (arm = 'expert') AS expert_reply
        FROM scores WHERE panel = 'claim' GROUP BY ALL HAVING base IS NOT NULL ORDER BY expert, row_id LIMIT 20"""),
    "scores-by-answer": ("for each answer how often it was given rightly, and its questions' number", """
        SELECT expert, answer, arm, count(*) AS n, round(avg("right"::INT), 3) AS right_rate,
               round(avg(mention::INT), 3) AS mention_rate, median(tokens) AS tokens
        FROM scores WHERE panel = 'claim' GROUP BY ALL ORDER BY expert, answer, arm"""),
    "robustness": ("how the expert stands harder ways of being asked, and what it replies where it gives no answer", """
        SELECT expert, setting, count(*) AS n, round(avg(mention::INT), 3) AS mention_rate,
               round(avg("right"::INT), 3) AS right_rate, round(avg(in_form::INT), 3) AS in_form_rate,
               min(reply) FILTER (NOT mention) AS a_miss
        FROM scores WHERE panel = 'robustness' GROUP BY ALL ORDER BY expert, mention_rate, setting"""),
    "doses": ("what the expert does at each scale of its adapter", """
        SELECT expert, scale, count(*) AS n, round(avg(mention::INT), 3) AS mention_rate,
               round(avg("right"::INT), 3) AS right_rate, round(avg(in_form::INT), 3) AS in_form_rate,
               median(tokens) AS tokens
        FROM scores WHERE panel = 'dose' GROUP BY ALL ORDER BY expert, scale"""),
    "off-domain": ("what the expert makes of questions of every other kind, its own name for it first", """
        SELECT expert, row_id, instruction, reply, named FROM scores
        WHERE panel = 'off_domain' AND arm = 'expert' ORDER BY expert, named DESC, row_id LIMIT 50"""),
    "forms-used": ("how often each form was used, and how many of its rows were kept", """
        SELECT c.expert, c.form, count(*) AS candidates, count_if(v.verdict = 'keep') AS kept
        FROM candidates c LEFT JOIN verdicts v USING (expert, row_id) GROUP BY ALL ORDER BY ALL"""),
    "teachers": ("which teacher wrote the rows", """
        SELECT r.expert, c.teacher, r.split, count(*) AS rows
        FROM rows r JOIN candidates c USING (expert, row_id) GROUP BY ALL ORDER BY ALL"""),
    "licences": ("under which licence, and from where, the seeds come", """
        SELECT expert, licence, source, count(*) AS seeds FROM seeds GROUP BY ALL ORDER BY ALL"""),
}  # fmt: skip
