//! `cargo xtask bench`: how many instructions things take, on the bare machine, on Xen and on Tenon.
//!
//! Every column runs in the same emulated machine, whose clock counts instructions, so results do not depend on the machine
//! the emulator runs on. The counts are those of our plugin for QEMU (`xtask/plugin`).

mod bars;
mod boot;
mod columns;
mod counts;
mod create;
mod debian;
mod guest;
mod host;
mod io;
mod patches;
mod plot;
mod profile;
mod report;
mod scripts;
mod stays;
mod wall;

use anyhow::{Result, ensure};
use std::process::ExitCode;
use xshell::Shell;
use xtask::{built, kernels};

/// What to measure, and what to do with the result.
#[derive(Clone, clap::Args)]
pub(crate) struct Options {
    /// What to measure
    which: Which,
    /// End with a failure if a bar is missed
    #[arg(long, conflicts_with = "only")]
    check: bool,
    /// Print the result as JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Keep table, plot and JSON in tests/bench/results (those of `patches` beside the patches)
    #[arg(long, conflicts_with_all = ["only", "profile", "stays"])]
    save: bool,
    /// Say as well which functions of ring 0 and dom0 the instructions belong to
    #[arg(long)]
    profile: bool,
    /// Say as well how long the stays in ring 0 were, and what they were for (`guest`)
    #[arg(long)]
    stays: bool,
    /// The kernel to measure with (`boot`, `guest` and `scripts`): a stock kernel, or one that is built here. One with our
    /// patches is compared with the same kernel without, and has bars of its own
    #[arg(long, value_name = "KERNEL", default_value = kernels::DEFAULT)]
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(kernels::all_names()))]
    kernel: String,
    /// Boot this system to its login prompt instead of the kernel to its init (`boot`, with the columns bare and tenon)
    #[arg(long, value_name = "SYSTEM", conflicts_with = "kernel")]
    guest: Option<System>,
    /// Only these columns
    #[arg(long, value_name = "COLUMN,...", value_delimiter = ',')]
    only: Vec<columns::Column>,
    /// Keep what the machines print and count in this folder
    #[arg(long, value_name = "FOLDER")]
    logs: Option<std::path::PathBuf>,
}

impl Options {
    /// Refuses what the bench that is asked for does not have.
    fn ensure_sense(&self) -> Result<()> {
        ensure!(self.which == Which::Guest || !self.stays, "--stays is for `bench guest`");
        let with_kernels = matches!(self.which, Which::Boot | Which::Guest | Which::Scripts);
        ensure!(
            with_kernels || self.kernel == kernels::DEFAULT,
            "--kernel is for `bench guest`, `bench boot` and `bench scripts`"
        );
        ensure!(self.which == Which::Boot || self.guest.is_none(), "--guest is for `bench boot`");
        let counts = self.which != Which::Wall;
        ensure!(counts || !(self.check || self.profile), "`bench wall` has no bars, and counts no instructions");
        Ok(())
    }
}

/// The benches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Which {
    /// From power-on to a stock guest's init
    Boot,
    /// Making and ending guests
    Create,
    /// What a stock guest's system calls, faults and processes cost
    Guest,
    /// What grants cost, reads from disks, and networks: TCP and UDP between guests, and TCP with the host
    Io,
    /// What each part of the patches for guest kernels gains
    Patches,
    /// What shell scripts cost in a stock guest
    Scripts,
    /// How long operations take by the clock: not exact, and never a failure
    Wall,
}

/// A system on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum System {
    /// Debian 12
    Debian,
}

/// Measures, and shows or keeps the result.
pub(crate) fn bench(sh: &Shell, options: &Options) -> Result<ExitCode> {
    options.ensure_sense()?;
    let report = measure(sh, options)?;
    if options.json {
        println!("{}", report.json());
    } else {
        print!("{}", report.markdown());
    }
    if options.save {
        let folder = match options.which {
            Which::Patches => built::folder(built::DEFAULT),
            _ => sh.current_dir().join("tests/bench/results"),
        };
        report.save(&folder)?;
    }
    let missed = report.bars.iter().filter(|bar| !bar.is_met()).count();
    if options.check && missed > 0 {
        eprintln!("error: {missed} bars missed");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(sh: &Shell, options: &Options) -> Result<report::Report> {
    let lab = || columns::Lab::new(sh, options);
    match options.which {
        Which::Boot if options.guest == Some(System::Debian) => {
            // Xen would need tools of its own in the system.
            let columns = [columns::Column::Bare, columns::Column::Tenon];
            let only = match options.only.as_slice() {
                [] => columns.to_vec(),
                only => only.to_vec(),
            };
            ensure!(only.iter().all(|column| columns.contains(column)), "--guest has the columns bare and tenon");
            debian::measure(sh, &columns::Lab::new(sh, &Options { only, ..options.clone() })?)
        }
        Which::Boot => boot::measure(sh, &lab()?),
        Which::Create => create::measure(&lab()?),
        Which::Guest => guest::measure(sh, &lab()?),
        Which::Io => io::measure(&lab()?),
        Which::Patches => patches::measure(sh, options),
        Which::Scripts => scripts::measure(sh, &lab()?),
        Which::Wall => wall::measure(&lab()?),
    }
}

/// Measures what is quick to measure, and answers which bars are met.
pub(crate) fn bars(sh: &Shell) -> Result<Vec<(String, bool)>> {
    let mut bars = Vec::new();
    for which in [Which::Create, Which::Guest] {
        let options = Options {
            which,
            check: true,
            json: false,
            save: false,
            profile: false,
            stays: false,
            kernel: kernels::DEFAULT.into(),
            guest: None,
            only: vec![],
            logs: None,
        };
        bars.extend(measure(sh, &options)?.bars.iter().map(|bar| (bar.line(), bar.is_met())));
    }
    Ok(bars)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, FromArgMatches, Parser, error::ErrorKind};

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn parse(line: &str) -> Result<Options, ErrorKind> {
        let matches = Line::command().try_get_matches_from(line.split(' '));
        Ok(matches.and_then(|matches| Line::from_arg_matches(&matches)).map_err(|why| why.kind())?.options)
    }

    #[test]
    fn what_is_asked_for_is_understood() {
        let options = parse("bench guest --only xen,tenon --json --logs folder").unwrap();
        assert_eq!((options.which, options.json, options.check, options.save), (Which::Guest, true, false, false));
        assert_eq!(options.only, [columns::Column::Xen, columns::Column::Tenon]);
        let options = parse("bench guest --kernel 6.12 --stays").unwrap();
        assert!(options.kernel == "6.12" && options.stays && options.ensure_sense().is_ok());
        assert!(parse("bench create --check --save").is_ok_and(|options| options.check && options.save));
    }

    #[test]
    fn what_nobody_knows_is_refused() {
        let refused = [
            ("bench", ErrorKind::MissingRequiredArgument),
            ("bench disk", ErrorKind::InvalidValue),
            ("bench guest fast", ErrorKind::UnknownArgument),
            ("bench guest --fast", ErrorKind::UnknownArgument),
            ("bench guest --only kvm", ErrorKind::InvalidValue),
            // Bars and results are about all columns, and a profile is not kept.
            ("bench guest --check --only tenon", ErrorKind::ArgumentConflict),
            ("bench guest --save --only tenon", ErrorKind::ArgumentConflict),
            ("bench guest --save --profile", ErrorKind::ArgumentConflict),
            ("bench guest --save --stays", ErrorKind::ArgumentConflict),
            ("bench guest --kernel 2.6", ErrorKind::InvalidValue),
        ];
        for (line, why) in refused {
            assert_eq!(parse(line).map(|_| ()), Err(why), "{line}");
        }
        for line in [
            "bench boot --stays",
            "bench create --kernel 6.12",
            "bench wall --check",
            "bench wall --profile",
            "bench io --guest debian",
        ] {
            assert!(parse(line).unwrap().ensure_sense().is_err(), "{line}");
        }
    }
}
