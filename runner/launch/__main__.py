"""Work on a run where no run.py lies beside the package: `python -P -m runner.launch key=value` is `python run.py`."""

import sys

from runner.installation import keep_own_packages_first
from runner.launch.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()
    keep_own_packages_first()
    # Not before: this imports `models` and `data`.
    from runner.launch.main import exit_process, main

    exit_process(main(sys.argv[1:]))
