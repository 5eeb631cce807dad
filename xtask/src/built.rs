//! Guest kernels that are built here: the distribution's source, the patches of `guest-kernel-patches`, and a configuration
//! that is committed beside them.
//!
//! One build folder per version keeps the objects of each configuration, so that a changed patch costs what depends on the
//! files it touches. What is built is cached by content: the version of the source, the patches, the configuration and the
//! compiler.

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

/// The names that `run` and `bench` know kernels of [`DEFAULT`] by: with the patches and without, with Debian's options, and
/// the same two with few.
pub const NAMES: [&str; 4] = ["patched", "unpatched", PATCHED_SMALL, "unpatched-small"];
/// The patched kernel with few options.
pub const PATCHED_SMALL: &str = "patched-small";

/// Which options a kernel is built with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Config {
    /// Debian's, without most drivers, protocols and file systems.
    Debian,
    /// Those without which a guest does not run, and few more.
    Small,
}

impl Config {
    /// The word for it.
    const fn name(self) -> &'static str {
        match self {
            Self::Debian => "debian",
            Self::Small => "small",
        }
    }

    /// The name of its file beside the patches.
    const fn file(self) -> &'static str {
        match self {
            Self::Debian => "config",
            Self::Small => "config-small",
        }
    }

    /// About how long a build from nothing takes on two CPUs.
    const fn minutes(self) -> u32 {
        match self {
            Self::Debian => 12,
            Self::Small => 4,
        }
    }
}

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
    name.starts_with("patched").then(|| format!("un{name}"))
}

/// What a kernel is called that is built so: one of [`NAMES`].
const fn name_of(config: Config, variant: Variant<'_>) -> &'static str {
    let [patched, unpatched, patched_small, unpatched_small] = NAMES;
    match (config, variant) {
        (Config::Debian, Variant::Patched(_)) => patched,
        (Config::Debian, Variant::Unpatched) => unpatched,
        (Config::Small, Variant::Patched(_)) => patched_small,
        (Config::Small, Variant::Unpatched) => unpatched_small,
    }
}

/// The kernel of [`DEFAULT`] that one of [`NAMES`] names, built first if need be.
///
/// # Errors
/// As [`build`].
pub fn named(sh: &Shell, name: &str) -> Result<Kernel> {
    let series = series(DEFAULT)?;
    for config in [Config::Debian, Config::Small] {
        for variant in [Variant::Patched(&series), Variant::Unpatched] {
            if name == name_of(config, variant) {
                return build(sh, DEFAULT, config, variant);
            }
        }
    }
    bail!("no kernel {name} is built here; there are: {}", NAMES.join(", "))
}

/// A kernel in the cache, built first if need be.
///
/// # Errors
/// Source or tools that cannot be fetched, a patch that does not apply, or a build that fails.
pub fn build(sh: &Shell, version: &str, config: Config, variant: Variant<'_>) -> Result<Kernel> {
    let source = Source::find(sh, version)?;
    let file = folder(version).join(config.file());
    let wanted = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let compiler = cmd!(sh, "gcc --version").quiet().read().context("a kernel build needs gcc")?;
    let compiler = compiler.lines().next().unwrap_or_default().to_owned();
    let name = name_of(config, variant);
    let patches = match variant {
        Variant::Patched(patches) => patches,
        Variant::Unpatched => &[],
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
    let workshop = Workshop { folder: cache::dir()?.join("kernel-build").join(source.version), tools, config };
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
        assert_eq!([unpatched("unpatched"), unpatched("6.12")], [None, None]);
    }
}
