"""The commands `mechedit` and `python -m mechedit`, and `accelerate launch -m mechedit`.

Whoever interrupts a command is answered by one line and exit code 130, also while its libraries are still being
imported, which takes seconds: they are imported within `main`. Libraries may catch an interrupt or leave half of
themselves behind; so until they are there the process ends at once. It has written nothing yet.
"""

LINE = "mechedit: interrupted; the same command goes on from what is finished\n"

try:
    import os
    import signal

    def leave(*_: object) -> None:
        """Say that the command was interrupted, and end the process."""
        os.write(2, LINE.encode())
        os._exit(130)

    def main() -> None:
        """Run the command line and leave with its exit code."""
        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler:  # a process that ignores interrupts goes on to do so
            signal.signal(signal.SIGINT, leave)
        from mechedit.cli import main as run

        try:
            signal.signal(signal.SIGINT, before)
            run()
        except KeyboardInterrupt:
            leave()

    if __name__ == "__main__":
        main()
except KeyboardInterrupt:
    import sys

    sys.stderr.write(LINE)
    sys.exit(130)
