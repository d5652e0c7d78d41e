"""The commands `mechedit` and `python -m mechedit`, and `accelerate launch -m mechedit`.

Whoever interrupts a command is answered by one line and exit code 130, also while its libraries are still being
imported, which takes seconds: they are imported within `main`. Libraries may catch an interrupt or leave half of
themselves behind; so until they are there the process ends at once. It has written nothing yet.
"""

LINE = "mechedit: interrupted; the same command goes on from what is finished\n"

try:
    import io
    import os
    import signal
    import sys

    def leave(*_: object) -> None:
        """Say that the command was interrupted, and end the process."""
        try:
            os.write(2, LINE.encode())
        finally:
            os._exit(130)

    def open_streams() -> None:
        """Let everything be printed; open the null device in the place of each standard stream that is closed.

        Else the next file that is opened takes its place, and gets what libraries print.
        """
        for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
                setattr(sys, name, os.fdopen(number, mode, closefd=False))
        for stream in (sys.stdout, sys.stderr):
            # Of another encoding than UTF-8, which lacks the arrows and letters of what is printed.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")

    def main() -> None:
        """Run the command line and leave with its exit code."""
        open_streams()
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
