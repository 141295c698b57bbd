"""What `python logger.py` shows of runs: their table, plots and page, the live status of one, their routes."""

from pathlib import Path

from cli import UserError
from logger import format_table, is_run
from terminal import say
from tools.plots import write_plots
from tools.report import follow, follow_report, keep_going, read_runs, write_report
from tools.routes import list_routes_files, write_analysis


def show_runs(args):
    """Prints or draws the runs that the flags name. Raises UserError if there are none, or if a name is unknown."""
    folders, plots_folder = find_runs(args), args.out_dir / "plots"
    page = plots_folder / "report.html"
    if args.routes:
        if not args.experiment_name:
            folders = list(filter(list_routes_files, folders)) or folders
        keep_going(folders, lambda folder: write_analysis(folder, plots_folder))
        return
    if args.follow and args.html:
        print(f"{page}: open it once; it is rewritten until the runs end (Ctrl-C to stop)", flush=True)
        follow_report(lambda: find_runs(args), args.out_dir, page)
        return
    if args.follow:
        if len(folders) > 1:
            names = ", ".join(folder.name for folder in folders)
            raise UserError(f"--follow shows one run; name it with --experiment_name: {names}")
        follow(folders[0])
        return

    say(f"reading {len(folders)} run{'s' * (len(folders) > 1)} below {args.out_dir}")
    runs = read_runs(folders)
    print(format_table(runs), end="\n\n")
    if args.html:
        say("drawing the page")
        write_report(runs, args.out_dir, page)
        print(page)
    else:
        write_plots(runs, plots_folder)


def find_runs(args) -> list[Path]:
    """The folders of the runs that the flags name, or of all."""
    found = sorted(folder.name for folder in args.out_dir.glob("*") if is_run(folder))
    if not found:
        raise UserError(f"no runs below {args.out_dir}; start one with `python train_muon.py` or name its --out_dir")
    for name in args.experiment_name:
        if name not in found:
            raise UserError(f"no experiment {name!r} below {args.out_dir}; there are: {', '.join(found)}")
    return [args.out_dir / name for name in dict.fromkeys(args.experiment_name or found)]
