//! The user's cache folder: everything xtask fetches or builds once lives here, keyed by content or version.

use anyhow::{Context, Result};
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

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
    Ok(tempfile::Builder::new().prefix("part-").tempdir_in(&dir)?)
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
