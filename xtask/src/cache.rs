//! The user's cache folder: everything xtask fetches or builds once lives here, keyed by content or version.

use anyhow::{Context, Result};
use std::env;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// How long the cache keeps, after its last use, what is cached by content: another content takes another place, so old ones
/// would pile up. It keeps a scratch folder as long whose maker was ended and could not remove it.
const KEPT: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// How the names of scratch folders begin.
const SCRATCH: &str = "part-";

/// `$XDG_CACHE_HOME/tenon`, or `~/.cache/tenon`.
///
/// # Errors
/// The user has neither.
pub fn dir() -> Result<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| env::home_dir().map(|home| home.join(".cache")))
        .context("no cache folder: neither XDG_CACHE_HOME nor a home folder is set")?;
    Ok(base.join("tenon"))
}

/// An exclusive lock that serialises the making of one kind of cached thing between checkouts.
///
/// Released when the returned file is dropped.
pub(crate) fn lock(kind: &str) -> Result<File> {
    let dir = dir()?;
    fs::create_dir_all(&dir).with_context(|| format!("cannot create the cache folder {}", dir.display()))?;
    let path = dir.join(format!("{kind}.lock"));
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// A scratch folder inside the cache, so that what is made in it can be renamed into place.
pub(crate) fn scratch() -> Result<tempfile::TempDir> {
    let dir = dir()?;
    fs::create_dir_all(&dir).with_context(|| format!("cannot create the cache folder {}", dir.display()))?;
    remove_unused(&dir, |name| name.starts_with(SCRATCH));
    Ok(tempfile::Builder::new().prefix(SCRATCH).tempdir_in(&dir)?)
}

/// Whether there is something cached by content at `target`, which counts as used now.
pub(crate) fn has(target: &Path) -> bool {
    // Who may read the cache and not write it uses it all the same.
    File::open(target).inspect(|file| drop(file.set_modified(SystemTime::now()))).is_ok()
}

/// As [`publish`], for what is cached by content: things in the same folder that nobody has used for [`KEPT`] are removed.
pub(crate) fn publish_by_content(staging: &Path, target: &Path) -> Result<()> {
    publish(staging, target)?;
    has(target);
    if let Some(folder) = target.parent() {
        remove_unused(folder, |_| true);
    }
    Ok(())
}

/// Removes from `folder` what has a name that `which` takes and was not used for [`KEPT`]. What cannot be removed stays.
fn remove_unused(folder: &Path, which: impl Fn(&str) -> bool) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        let unused = metadata.modified().ok().and_then(|time| time.elapsed().ok()).is_some_and(|since| since > KEPT);
        if unused && entry.file_name().to_str().is_some_and(&which) {
            let path = entry.path();
            let _ = if metadata.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
}

/// Bytes that the cache takes on its disk.
///
/// # Errors
/// No cache folder can be named.
pub fn size() -> Result<u64> {
    Ok(size_below(&dir()?))
}

/// What disappears meanwhile counts nothing.
fn size_below(folder: &Path) -> u64 {
    let of = |entry: fs::DirEntry| {
        let Ok(metadata) = entry.metadata() else { return 0 };
        // The unit is that of stat(2), whatever the file system's blocks are.
        metadata.blocks() * 512 + if metadata.is_dir() { size_below(&entry.path()) } else { 0 }
    };
    fs::read_dir(folder).into_iter().flatten().flatten().map(of).sum()
}

/// Moves a finished `staging` folder or file to `target`; whoever comes second keeps the first one's result.
pub(crate) fn publish(staging: &Path, target: &Path) -> Result<()> {
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::rename(staging, target) {
        Err(_) if target.exists() => Ok(()),
        other => other.with_context(|| format!("cannot move {} to {}", staging.display(), target.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn aged(path: &Path, age: Duration) {
        File::open(path).unwrap().set_modified(SystemTime::now() - age).unwrap();
    }

    #[test]
    fn what_nobody_uses_makes_room_for_what_is_new() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["unused", "used", "young", "new"] {
            fs::write(at(name), name).unwrap();
        }
        fs::create_dir(at("folder")).unwrap();
        fs::write(at("folder").join("file"), "").unwrap();
        for name in ["unused", "used", "folder"] {
            aged(&at(name), KEPT * 2);
        }
        aged(&at("young"), KEPT / 2);
        assert!(has(&at("used")) && !has(&at("absent")));
        publish_by_content(&at("new"), &at("published")).unwrap();
        let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["published", "used", "young"]);
    }

    #[test]
    fn only_what_matches_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["part-a", "kernel"] {
            fs::write(folder.path().join(name), "").unwrap();
            aged(&folder.path().join(name), KEPT * 2);
        }
        remove_unused(folder.path(), |name| name.starts_with(SCRATCH));
        assert!(folder.path().join("kernel").is_file() && !folder.path().join("part-a").exists());
    }

    #[test]
    fn holes_take_no_room() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("in")).unwrap();
        fs::write(folder.path().join("in/full"), vec![1; 1 << 20]).unwrap();
        File::create(folder.path().join("in/hole")).unwrap().set_len(1 << 30).unwrap();
        let size = size_below(folder.path());
        assert!((1 << 20..2 << 20).contains(&size), "{size}");
    }
}
