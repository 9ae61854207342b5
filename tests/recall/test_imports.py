import subprocess
import sys

SCRIPT = """
import sys, jprune
early = {"jprune.recall", "scipy", "pandas"} & set(sys.modules)
jprune.recall.t_interval([1.0, 2.0])
late = {"matplotlib", "statsmodels", "jinja2", "rich", "tyro", "pyarrow.parquet"} & set(sys.modules)
sys.exit(f"jprune imports {early}, jprune.recall imports {late}" if early or late else 0)
"""


def test_the_recall_wing_is_loaded_when_first_used_and_the_extras_later_still():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
