"""The findings as one table: a row for each check and state, with the nodes it holds for; remedies below their rows."""

from __future__ import annotations

from repa_scale.doctor.finding import FAIL, OK, ORDER, WARN, Finding

NAMED = 4  # nodes of a row that are named before "and N more"


def page(findings: list[Finding], nodes: list[str]) -> str:
    """The table, and a last line that sums up."""
    rows = [("check", "state", "nodes", "found")]
    for check in dict.fromkeys(each.check for each in findings):
        for state in ORDER:
            chosen = [each for each in findings if each.check == check and each.state == state]
            # What is well needs no row a node; what is not is told for each.
            for words in [""] if state == OK and chosen else dict.fromkeys((e.found, e.remedy) for e in chosen):
                these = chosen if words == "" else [each for each in chosen if (each.found, each.remedy) == words]
                rows.append((check, state, _names([each.node for each in these], nodes), these[0].found))
                if these[0].remedy:
                    rows.append(("", "", "", f"-> {these[0].remedy}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}".rstrip() for row in rows]
    return "\n".join([*lines, "", summary(findings, nodes)])


def summary(findings: list[Finding], nodes: list[str]) -> str:
    failed, warned = ([each for each in findings if each.state == state] for state in (FAIL, WARN))
    here = f"{len(nodes)} node{'s' * (len(nodes) > 1)}"
    if failed:
        checks = ", ".join(dict.fromkeys(each.check for each in failed))
        return f"{here}: {len(failed)} in the way of a run ({checks}), {len(warned)} warnings"
    return f"{here}: nothing is in the way of a run, {len(warned)} warnings"


def _names(these: list[str], nodes: list[str]) -> str:
    unique = list(dict.fromkeys(these))
    if len(nodes) > 1 and set(nodes) <= set(unique):
        return "all"
    more = len(unique) - NAMED
    return ", ".join(each or "all" for each in unique[:NAMED]) + (f" and {more} more" if more > 0 else "")
