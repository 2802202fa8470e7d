"""Settings of every script: a dataclass at the top of the file, filled from the command line.

Order: default < preset < what was typed. A field's comment is its help text, its default its type.
"""
import difflib
import inspect
import re
import sys
from dataclasses import fields


def die(message, code=2):
    """Every failure that we foresee ends here: one line on stderr, no traceback; 2 = the call is wrong."""
    print("error:", message, file=sys.stderr)
    sys.exit(code)


def launch(work):
    """Run a script: wrong input is one line and exit code 2, diverged or a dead worker 1, Ctrl-C 130."""
    try:
        work()
    except (ValueError, OSError) as error:
        die(str(error).strip().splitlines()[-1])
    except (FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        die(str(error).splitlines()[0], 1)
    except KeyboardInterrupt:
        die("interrupted; the same command goes on from what is finished", 130)


def cli(Config, presets=None, argv=None):
    """Fill Config: its defaults, then --preset NAME, then each option given; other words go to `inputs`.
    A field `from_` is typed --from. Raises SystemExit: 0 after --help, 2 with one line on a wrong call."""
    argv, presets, given = list(sys.argv[1:] if argv is None else argv), presets or {}, {}
    default = {f.name: f.default for f in fields(Config)}
    if {"-h", "--help"} & set(argv):
        print(inspect.getmodule(Config).__doc__, "\npresets:", ", ".join(presets) or "none")
        default |= presets.get(default.get("preset"), {})
        notes = {}
        for cls in reversed(Config.__mro__[:-1]):
            notes |= re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M)
        notes.pop("inputs", None)  # has no name on the command line
        for name, note in notes.items():
            print(f"  --{name.rstrip('_'):<22} {note} (default {default[name]!r})")
        sys.exit(0)
    while argv:
        word, equals, text = argv.pop(0).partition("=")
        if word == "--":  # everything after it is an input, also -x.png
            given["inputs"], argv = (*given.get("inputs", ()), *argv), []
            continue
        name = "out" if word == "-o" else word.removeprefix("--")
        name = name + "_" if name + "_" in default else name  # Python keywords
        if not word.startswith("-") and "inputs" in default:
            given["inputs"] = (*given.get("inputs", ()), word + equals + text)
            continue
        if not word.startswith("-") or name not in default:
            near = difflib.get_close_matches(name, default, 1)
            die(f"unknown option {word}" + (f", did you mean --{near[0]}?" if near else "; --help lists all"))
        like = default[name]
        if not equals and isinstance(like, bool) and argv[:1] not in (["true"], ["false"]):
            text = "true"  # a bare switch
        elif not equals:
            text = argv.pop(0) if argv and not argv[0].startswith("--") else die(f"--{name} needs a value")
        kind = {"true": True, "false": False}.__getitem__ if isinstance(like, bool) else type(like)
        try:  # a tuple is written 0.05,0.25
            given[name] = (kind(text) if not isinstance(like, tuple) else
                           tuple(type(a)(b) for a, b in zip(like, text.split(","), strict=True)))
        except (KeyError, ValueError):
            die(f"--{name} wants {type(like).__name__} like {like!r}, got {text!r}")
    preset = given.get("preset", default.get("preset"))
    if preset and preset not in presets:
        die(f"unknown preset {preset!r}, choose one of: {', '.join(presets)}")
    return Config(**(presets.get(preset, {}) | given))


def validate(cfg, **rules):
    """Die unless each setting named here is one of its rule's words, or at least its rule's number."""
    for name, rule in rules.items():
        value, least = getattr(cfg, name), isinstance(rule, int)
        if value < rule if least else value not in rule:
            wanted = f"starts at {rule}" if least else f"is one of {', '.join(rule)}"
            die(f"--{name} {wanted}, got {value!r}")


def show(cfg):
    """Print every setting once; a star marks what differs from the default."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        print(f"{'*' if value != f.default else ' '} {f.name:<24} {value}")
