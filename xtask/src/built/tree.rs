//! A Git repository with the series, for those who change patches: the source is its first commit, and each patch is one more.

use super::series::{Patch, folder, series};
use super::source::Source;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// The tag of the commit with the source.
const SOURCE: &str = "source";
/// The line after which Git writes its own version.
const END: &str = "\n-- \n";

/// Makes the repository in the new folder `target`. If this fails, nothing is left of it.
///
/// # Errors
/// The folder is there; no Git; or a patch that does not apply.
pub fn grow(source: &Source, patches: &[Patch], target: &Path) -> Result<()> {
    ensure!(!target.exists(), "{} is there already", target.display());
    let parent = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(parent.is_dir(), "no folder for {}", target.display());
    let scratch = tempfile::Builder::new().prefix("part-").tempdir_in(parent)?;
    let tree = scratch.path().join("tree");
    // A copy and no links: an editor may write into a file.
    let copied = Command::new("cp").args(["-a", "--reflink=auto"]).args([&source.tree, &tree]).status()?;
    ensure!(copied.success(), "cannot copy the kernel source to {}", parent.display());
    for arguments in [
        &["init", "-q", "-b", "series"][..],
        // Nobody fetches from here, and a pack of it would take minutes.
        &["config", "gc.auto", "0"],
        &["config", "core.compression", "1"],
        // The source ignores some of its own files.
        &["add", "-A", "-f"],
        &["commit", "-q", "-m", &source.package],
        &["tag", SOURCE],
    ] {
        git(&tree, arguments)?;
    }
    let files = folder(source.version);
    for Patch { name, .. } in patches {
        let file = files.join(name);
        let file = file.to_str().context("a path that is no text")?;
        git(&tree, &["am", "-q", "--committer-date-is-author-date", file]).with_context(|| name.clone())?;
    }
    fs::rename(&tree, target).with_context(|| format!("cannot make {}", target.display()))
}

/// Writes the commits behind the source in the repository `tree` to the files of the series for `version`, and returns the
/// series. Files whose patch stays are not touched.
///
/// # Errors
/// No such repository, changes in it that are not committed, or no commit behind the source.
pub fn harvest(tree: &Path, version: &str) -> Result<Vec<Patch>> {
    let changed = git(tree, &["status", "--porcelain", "--untracked-files=no"])?;
    if let Some(line) = changed.lines().next() {
        let file = line.get(3..).unwrap_or(line);
        bail!("{}: {file} has changes that no commit has", tree.display());
    }
    let scratch = tempfile::tempdir()?;
    let out = scratch.path().to_str().context("a path that is no text")?;
    let form = ["--zero-commit", "--no-stat", "--no-numbered", "--abbrev=7", "-q", "-o", out];
    git(tree, &[&["format-patch"][..], &form, &[&format!("{SOURCE}..HEAD")]].concat())?;
    let mut names = Vec::new();
    for entry in fs::read_dir(scratch.path())? {
        names.push(entry?.file_name().into_string().ok().context("a patch whose name is no text")?);
    }
    names.sort();
    ensure!(!names.is_empty(), "{} has no commit behind `{SOURCE}`", tree.display());
    let (folder, before) = (folder(version), series(version)?);
    for name in &names {
        let text = fs::read_to_string(scratch.path().join(name))?;
        if before.iter().all(|patch| patch.name != *name || unsigned(&patch.text) != unsigned(&text)) {
            fs::write(folder.join(name), text)?;
            println!("{name} is written");
        }
    }
    for patch in before.iter().filter(|patch| !names.contains(&patch.name)) {
        fs::remove_file(folder.join(&patch.name))?;
        println!("{} is removed", patch.name);
    }
    let list = folder.join("series");
    let text = fs::read_to_string(&list)?;
    let comments = text.lines().filter(|line| line.starts_with('#'));
    let lines: String = comments.chain(names.iter().map(String::as_str)).map(|line| format!("{line}\n")).collect();
    if lines != text {
        fs::write(&list, lines)?;
    }
    series(version)
}

/// A patch without the version of the Git that wrote it.
fn unsigned(text: &str) -> &str {
    text.rfind(END).map_or(text, |at| &text[..at])
}

/// Runs Git in the repository `tree` and returns what it prints.
fn git(tree: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("git");
    command.arg("-C").arg(tree).args(arguments).stdin(Stdio::null());
    // Who commits the source matters to nobody, and not everyone has told Git a name.
    for who in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{who}_NAME"), "xtask").env(format!("GIT_{who}_EMAIL"), "xtask@localhost");
    }
    // Not another repository than the one in the folder.
    command.env_remove("GIT_DIR").env_remove("GIT_WORK_TREE").env_remove("GIT_INDEX_FILE");
    let output = command.output().context("cannot start git")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "git {} in {}: {}",
        arguments.first().unwrap_or(&""),
        tree.display(),
        said.lines().next().unwrap_or("nothing was said")
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
