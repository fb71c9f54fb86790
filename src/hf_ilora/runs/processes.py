"""Starts and ends the work of a program, alone or as one of several processes."""

import atexit
import errno
import logging
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub.constants import HF_HOME
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from hf_ilora.devices import process_state
from hf_ilora.downloads import DownloadError, default_cache_dir
from hf_ilora.files import failed_write, held_folder, lock_text, sees_holder
from hf_ilora_cli.closed_output import closed_output_ends
from hf_ilora_cli.commands import COMMANDS, PROGRAM, PROGRAM_VARIABLE
from hf_ilora_cli.shown_text import shown, shown_lines
from hf_ilora_cli.signals import end_with_launcher, interrupted_code, termination_raises

# A user causes and can fix these: a wrong setting, a file that is missing or cannot be written, a download that fails.
_MISTAKES = (ValueError, OSError, DownloadError)
# The values of TrainingArguments' own option --debug.
_TRAINER_DEBUG = ("underflow_overflow", "tpu_metrics_debug")
_MISTAKE_CODE, _BUG_CODE = 2, 1
# The remedies for errors of the file system.
_AGAIN = "and run the same command again"
_SPACE = f"free some space or choose a folder on another disk, {_AGAIN}"
_PERMISSION = "change its owner or permissions, or choose another one"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: f"raise the limit for the size of files (ulimit -f), {_AGAIN}",
    errno.EIO: f"check the disk and the space that is left on it, {_AGAIN}",
    errno.ESTALE: f"check the connection to the network disk, {_AGAIN}",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EEXIST: "it is a file already, where a folder is expected; choose another path",
    errno.EISDIR: "a file is expected; choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: f"raise the limit for open files (ulimit -n), {_AGAIN}",
}


class ProgramFailed(RuntimeError):
    """A program that this one started failed, and has printed why.

    Args:
        message: which program, and what to do.
        exit_code: the program's exit code, with which this one ends too.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def program_name() -> str:
    """The name of this program in messages: `hf-ilora prepare`, or the file name of the recipe."""
    return os.environ.get(PROGRAM_VARIABLE) or Path(sys.argv[0]).name


def command_words() -> list[str] | None:
    """The words of the `hf-ilora` command that this process runs, without tokens; None where it runs no recipe."""
    names = {command.recipe: command.name for command in COMMANDS.values()}
    name = names.get(Path(sys.argv[0]).stem)
    if name is None:
        return None
    words, options = [PROGRAM, name], iter(sys.argv[1:])
    for word in options:
        option, equals, _ = word.partition("=")
        if not (option.startswith("--") and option.endswith("_token")):
            words.append(word)
        elif not equals:
            next(options, None)  # its value
    return words


def run_main(main: Callable[[], None]) -> None:
    """Run the main function of a recipe, and end the process with an exit code.

    A user's mistake (a ValueError, a file that cannot be read or written, a failed download) ends in a message of one
    or two lines, with the remedy, and exit code 2; `--debug` on the command line adds the traceback. Any other error
    shows its traceback and ends with exit code 1, Ctrl-C with 130, SIGTERM with 143: both raise, so `run.json` says how
    the run ended. If the reader of the output has left, as in `| head`, it ends with 141 and no message. After
    `set_up_logging`, `run.log` has every traceback.

    Only the main process of a launch prints. The others leave their error to the launcher.
    """
    debug = _take_debug(sys.argv)
    end_with_launcher()
    try:
        with termination_raises(), closed_output_ends(_end):
            main()
    except KeyboardInterrupt as error:
        logging.getLogger(__name__).info("%s", str(error) or "ended by Ctrl-C")
        _end(interrupted_code(error))
    except ProgramFailed as error:
        _write_to_run_log(error)
        print(f"{program_name()}: error: {shown(error)}", file=sys.stderr)
        _end(error.exit_code)
    except Exception as raised:
        _write_to_run_log(raised)
        error = failed_write(raised) or raised
        is_mistake = isinstance(error, _MISTAKES)
        if _is_main_process() or "TORCHELASTIC_ERROR_FILE" not in os.environ:
            if debug or not is_mistake:
                print(shown_lines(traceback.format_exc()), end="", file=sys.stderr)
            if is_mistake:
                print(f"{program_name()}: error: {shown(_message(error))}", file=sys.stderr)
                if not debug and not _explains_itself(error):
                    print("--debug shows the traceback", file=sys.stderr)
        else:
            get_error_handler().record_exception(error)
        _end(_MISTAKE_CODE if is_mistake else _BUG_CODE)
    leave_launch()


@contextmanager
def sole_writer(output_dir: str | os.PathLike) -> Iterator[None]:
    """Lock the output folder of a run, so that a second command for it is refused. Only the main process locks it.

    Every process of a launch enters this block, after `parse_arguments`, which initialises the state that the processes
    share. All of them must see the folder: they read checkpoints that the main process wrote.

    Raises:
        ValueError, OSError: `held_folder` fails in the main process, or a process does not see the folder because its
            machine does not share the disk. Every process raises it.
    """
    refusal, holder, state = None, None, process_state()
    with ExitStack() as stack:
        if state.is_main_process:
            try:
                stack.enter_context(held_folder(output_dir))
                holder = lock_text(output_dir)
            except (ValueError, OSError) as error:
                refusal = error
        refusal, holder = broadcast_object_list([refusal, holder])
        if refusal is not None:
            raise refusal
        own = f"process {state.process_index} on {platform.node()}"
        if blind := gather_object([] if sees_holder(output_dir, holder) else [own]):
            raise ValueError(
                f"{output_dir} of the first process is not seen by {', '.join(blind)}: expected a disk that all "
                "machines of the launch share; choose an output_dir there, or launch on one machine"
            )
        yield


def leave_launch() -> None:
    """End this process with success if it is one of several of a launch; a program calls it last.

    Gloo's threads may keep tensors for a moment after the program ends. A thread that releases one while the
    interpreter shuts down sometimes aborts the process ("terminate called without an active exception"), and the
    launcher then reports a finished run as failed. Destroying the process group first does not help while a wrapped
    model refers to it (pytorch/pytorch, pull request 179291). This function therefore runs the exit handlers itself and
    ends the process without shutting the interpreter down. In a single process it does nothing.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    torch.distributed.barrier()  # no process leaves while another one still waits for it
    _end(0)


def _end(code: int) -> None:
    """End this process; one of several ends at once, without shutting the interpreter down (see `leave_launch`)."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    if code == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _take_debug(words: list[str]) -> bool:
    """Remove each bare `--debug` from a command line; returns whether there was one."""
    places = [
        place
        for place, word in enumerate(words)
        if word == "--debug" and not (place + 1 < len(words) and words[place + 1] in _TRAINER_DEBUG)
    ]
    for place in reversed(places):
        del words[place]
    return bool(places)


def _message(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return f"{': '.join(map(str, filter(None, (error.strerror, error.filename))))}: {_remedy(error)}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line) or type(error).__name__


def _remedy(error: OSError) -> str:
    """The remedy for an error of the file system; for a cache, it names the variable that moves the cache."""
    caches = {"HF_ILORA_CACHE": default_cache_dir(), "HF_HOME": Path(HF_HOME)}
    if error.filename is not None and error.errno not in (errno.ENOENT, errno.EFBIG):
        for variable, folder in caches.items():
            if Path(os.fsdecode(error.filename)).absolute().is_relative_to(folder.absolute()):
                return f"{_REMEDIES[error.errno]}, or set {variable} to another folder than {folder}"
    return _REMEDIES[error.errno]


def _explains_itself(error: Exception) -> bool:
    """Whether the message alone says what to do: hf_ilora or the recipe raised it, or it names a file."""
    if isinstance(error, OSError | DownloadError):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith(("hf_ilora", "__main__"))


def _write_to_run_log(error: Exception) -> None:
    """Write the traceback to the log files of the run, but not to the console."""
    logger = logging.getLogger(__name__)
    info = (type(error), error, error.__traceback__)
    record = logger.makeRecord(__name__, logging.ERROR, __file__, 0, "the run failed", (), info)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
