//! `cargo xtask kernel`: builds a guest kernel with our patches, and says things about the patches.

use anyhow::{Result, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use xshell::Shell;
use xtask::built::{self, Config, Patch, Source, Variant};

/// What to build, or to say.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The kernel's version
    #[arg(long, value_name = "VERSION", default_value = built::DEFAULT)]
    version: String,
    /// Build the source as it is, for comparison
    #[arg(long, conflicts_with_all = ["stat", "check"])]
    stock: bool,
    /// Build with few options instead of Debian's: the kernel `patched-small`, or with --stock `unpatched-small`
    #[arg(long)]
    small: bool,
    /// Say how large the patches are, and build nothing
    #[arg(long, conflicts_with = "check")]
    stat: bool,
    /// Apply the patches one by one, check their form, and build the kernel with all of them
    #[arg(long)]
    check: bool,
    /// Build the kernel after each patch
    #[arg(long, requires = "check")]
    all: bool,
    /// Make a Git repository in the new folder DIR, with the source as its first commit and each patch as one more, to change
    /// them there; and build nothing
    #[arg(long, value_name = "DIR", conflicts_with_all = ["stock", "small", "stat", "check", "from"])]
    tree: Option<PathBuf>,
    /// First write the commits in DIR, made by --tree, to the files of the patches
    #[arg(long, value_name = "DIR", conflicts_with = "stock")]
    from: Option<PathBuf>,
}

/// Carries out what is asked for.
pub(crate) fn kernel(sh: &Shell, options: &Options) -> Result<()> {
    let source = Source::find(sh, &options.version)?;
    println!("{}", source.package);
    if options.stock {
        return build(sh, options, Variant::Unpatched);
    }
    let series = match &options.from {
        Some(tree) => built::harvest(tree, &options.version)?,
        None => built::series(&options.version)?,
    };
    if let Some(tree) = &options.tree {
        built::grow(&source, &series, tree)?;
        println!("{} has {} commits behind the source", tree.display(), series.len());
        return Ok(());
    }
    if options.stat {
        return stat(&source, &series);
    }
    if options.check {
        for patch in &series {
            built::check_form(sh, &source, patch)?;
        }
        for number in 1..=series.len() {
            let patches = &series[..number];
            source.apply(patches)?;
            if options.all && number < series.len() {
                println!("{}", patches[number - 1].name);
                build(sh, options, Variant::Patched(patches))?;
            }
        }
        println!("{} patches apply exactly, and their form is right", series.len());
    }
    build(sh, options, Variant::Patched(&series))
}

fn build(sh: &Shell, options: &Options, variant: Variant<'_>) -> Result<()> {
    let config = if options.small { Config::Small } else { Config::Debian };
    let kernel = built::build(sh, &options.version, config, variant)?;
    println!("{}\n{}\n{}", kernel.version()?, kernel.vmlinux.display(), kernel.bzimage.display());
    Ok(())
}

/// Says how many lines each patch has, and what share of the source all have together.
fn stat(source: &Source, series: &[Patch]) -> Result<()> {
    let (mut files, mut total) = (BTreeSet::new(), (0, 0));
    for patch in series {
        let (added, removed) = patch.lines();
        println!("{added:>5} + {removed:>4} -  {:>2} files  {}", patch.files().len(), patch.name);
        files.extend(patch.files());
        total = (total.0 + added, total.1 + removed);
    }
    println!("{:>5} + {:>4} -  {:>2} files  together", total.0, total.1, files.len());
    let of = |folders: &[&str]| -> Result<usize> {
        folders.iter().map(|folder| lines_below(&source.tree.join(folder))).sum()
    };
    for (what, folders) in [("arch/x86 and mm", &["arch/x86", "mm"][..]), ("the whole source", &[""][..])] {
        let lines = of(folders)?;
        ensure!(lines > 0, "{} has no source", source.tree.display());
        println!("{} of the {lines} lines of {what}", share(total.0, lines));
    }
    Ok(())
}

/// A share in per cent.
#[allow(clippy::cast_precision_loss, reason = "counts of lines are far below 2^52")]
fn share(part: usize, whole: usize) -> String {
    format!("{:.4} %", part as f64 * 100.0 / whole as f64)
}

/// Lines of all files of C and assembly below `folder`.
fn lines_below(folder: &Path) -> Result<usize> {
    let mut lines = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        if kind.is_dir() {
            lines += lines_below(&path)?;
        } else if kind.is_file() && path.extension().is_some_and(|it| it == "c" || it == "h" || it == "S") {
            lines += fs::read(&path)?.split(|byte| *byte == b'\n').count().saturating_sub(1);
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_c_and_assembly_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("d")).unwrap();
        for (name, text) in [("a.c", "1\n2\n"), ("d/b.S", "1\n"), ("d/c.txt", "1\n2\n3\n")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        assert_eq!(lines_below(folder.path()).unwrap(), 3);
        assert_eq!(share(3, 1200), "0.2500 %");
    }
}
