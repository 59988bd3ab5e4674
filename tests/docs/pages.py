"""What is generated of docs/ and the chart: python -m tests.docs.pages writes it, a test compares
it.
"""

import re
from pathlib import Path

from serving.settings import Settings
from tests.docs import ablations, chart, figures, scaling
from tests.serving import parity, test_parity, test_vllm, test_vllm_parity

DOCS = Path(__file__).parents[2] / "docs"
TABLE = re.compile(
    r"(<!-- (?:serving/settings|tests/docs/scaling).py -->\n).*?(<!-- end -->)", re.DOTALL
)


def settings_table() -> str:
    """One line for each setting of serving."""
    lines = ["| variable | default | what |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = str(field.default)
        lines.append(f"| `INSTRUCTLOOP_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Each page with what it should say."""
    return {
        **{
            DOCS / name: TABLE.sub(rf"\g<1>{table}\g<2>", (DOCS / name).read_text("utf-8"))
            for name, table in (
                ("configuration.md", settings_table()),
                ("scaling.md", scaling.table()),
            )
        },
        chart.SCHEMA: chart.schema(),
        DOCS / "figures.md": figures.page(),
        DOCS / "parity.md": parity.page(test_parity, test_vllm_parity, test_vllm),
    }


def main() -> None:
    for path, text in {**pages(), **ablations.plots(DOCS)}.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
