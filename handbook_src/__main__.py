"""The two commands, on a machine that has Python 3.11+ and git and nothing else.

    python3 -m handbook_src book    executes every chapter and builds the site
    python3 -m handbook_src test    proves it: every test, every notebook again

The first run makes ``.venv`` from ``environment.yml``; later runs find it.
This file must parse on old Pythons, so that they get a sentence and not a
SyntaxError: all that is newer lives in ``handbook_src.publish``.
"""

import sys


def main():  # type: ignore[no-untyped-def]  # old Pythons run this
    if sys.version_info < (3, 11):  # noqa: UP036  # that is what is being checked
        here = "{}.{} ({})".format(sys.version_info[0], sys.version_info[1], sys.executable)  # noqa: UP032
        sys.exit(
            "The handbook needs Python 3.11 or newer, and this is Python " + here + ".\n"
            "Install a newer one beside it and call that, for instance:\n"
            "    python3.11 -m handbook_src book"
        )
    from handbook_src.publish.command import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
