//! Guest kernels that are built here: the distribution's source, the patches of `guest-kernel-patches`, and the configuration
//! that is committed beside them.
//!
//! One build folder per version keeps its objects, so that a changed patch costs what depends on the files it touches. What is
//! built is cached by content: the version of the source, the patches, the configuration and the compiler.

mod series;
mod source;
pub(crate) mod tools;
mod tree;
mod workshop;

pub use series::{Patch, check_form, folder, parts, series};
pub use source::Source;
pub use tree::{grow, harvest};

use crate::kernels::Kernel;
use crate::{cache, kernel_file};
use anyhow::{Context, Result, bail};
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use workshop::Workshop;
use xshell::{Shell, cmd};

/// The version that is built where none is named.
pub const DEFAULT: &str = "6.12";

/// The names that `run` and `bench` know kernels of [`DEFAULT`] by: with the patches and without.
pub const NAMES: [&str; 2] = [PATCHED, UNPATCHED];
const PATCHED: &str = "patched";
const UNPATCHED: &str = "unpatched";

/// Whether a kernel has the patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant<'a> {
    /// It has these.
    Patched(&'a [Patch]),
    /// It is the source as it is, for comparison.
    Unpatched,
}

/// The name of the same kernel without the patches, if the kernel called `name` has them.
#[must_use]
pub fn unpatched(name: &str) -> Option<String> {
    name.starts_with(PATCHED).then(|| format!("un{name}"))
}

/// The kernel of [`DEFAULT`] that one of [`NAMES`] names, built first if need be.
///
/// # Errors
/// As [`build`].
pub fn named(sh: &Shell, name: &str) -> Result<Kernel> {
    match name {
        PATCHED => build(sh, DEFAULT, Variant::Patched(&series(DEFAULT)?)),
        UNPATCHED => build(sh, DEFAULT, Variant::Unpatched),
        _ => bail!("no kernel {name} is built here; there are: {}", NAMES.join(", ")),
    }
}

/// A kernel in the cache, built first if need be.
///
/// # Errors
/// Source or tools that cannot be fetched, a patch that does not apply, or a build that fails.
pub fn build(sh: &Shell, version: &str, variant: Variant<'_>) -> Result<Kernel> {
    let source = Source::find(sh, version)?;
    let file = folder(version).join("config");
    let wanted = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let compiler = cmd!(sh, "gcc --version").quiet().read().context("a kernel build needs gcc")?;
    let compiler = compiler.lines().next().unwrap_or_default().to_owned();
    let (name, patches) = match variant {
        Variant::Patched(patches) => (PATCHED, patches),
        Variant::Unpatched => (UNPATCHED, &[][..]),
    };
    let mut hasher = DefaultHasher::new();
    (&source.package, &wanted, &compiler).hash(&mut hasher);
    patches.iter().for_each(|patch| patch.changes().hash(&mut hasher));
    let built = cache::dir()?.join("kernel-built").join(source.version);
    let target = built.join(format!("{name}-{:016x}", hasher.finish()));
    let kernel = Kernel { bzimage: target.join("bzImage"), vmlinux: target.join("vmlinux") };
    if target.is_dir() {
        return Ok(kernel);
    }
    let _lock = cache::lock("kernel-built")?;
    if target.is_dir() {
        return Ok(kernel);
    }
    source::room()?;
    let tools = tools::ready(sh)?;
    let workshop = Workshop { folder: cache::dir()?.join("kernel-build").join(source.version), tools };
    workshop.lay_out(sh, &source, &source.apply(patches)?)?;
    workshop.configure(&file, &wanted)?;
    workshop.make(&format!("{} {name}", source.package))?;
    let scratch = cache::scratch()?;
    let staging = scratch.path().join("kernel");
    fs::create_dir_all(&staging)?;
    let bzimage = fs::read(workshop.bzimage()).context("the build made no bzImage")?;
    fs::write(staging.join("vmlinux"), kernel_file::unpack(&bzimage)?)?;
    fs::write(staging.join("bzImage"), &bzimage)?;
    let patched = match patches.len() {
        0 => name.to_owned(),
        number => format!("{name} ({number} in the series)"),
    };
    fs::write(staging.join("version"), format!("{} {patched}, {compiler}\n", source.package))?;
    cache::publish(&staging, &target)?;
    Ok(kernel)
}

fn last_line(text: &str) -> &str {
    text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing was said")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_patched_kernel_has_an_unpatched_one() {
        let pairs: Vec<_> = NAMES.into_iter().filter_map(unpatched).collect();
        assert!(!pairs.is_empty() && pairs.iter().all(|name| NAMES.contains(&&**name)), "{pairs:?}");
        assert_eq!([unpatched(UNPATCHED), unpatched("6.12")], [None, None]);
    }
}
