"""A standalone model server (`python -m services.modelserver`), or with --zygote a validator's nursery."""

import os
import sys


def main() -> None:
    """Start what the command line asks for."""
    # Read once, when torch is imported: its threads sleep while they wait, and leave shared cores to others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "--zygote" in sys.argv[1:]:
        # Nothing of gRPC may run before the zygote forks, so its module is imported alone.
        from services.modelserver import nursery

        nursery.main()
    else:
        from services.modelserver import standalone

        standalone.main()


if __name__ == "__main__":
    main()
