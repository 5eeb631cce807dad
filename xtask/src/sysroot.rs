//! Makes `core` and `alloc` available for the bare-metal target.
//!
//! Where rustup (or a distribution) has installed the target there is nothing to do. Elsewhere the two crates are
//! compiled once from the source of exactly this compiler and kept in the user's cache; `.cargo/sysroot.toml` (ignored
//! by git, included by `.cargo/config.toml`) points cargo at them.

use crate::{TARGET, apt, cache};
use anyhow::{Context, Result, bail, ensure};
use rustc_build_sysroot::{SysrootBuilder, SysrootConfig};
use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::{Shell, cmd};

/// Source packages whose version no longer appears in a signed index: rustc version, path in the pool, SHA-256.
const PINNED: &[(&str, &str, &str)] = &[(
    "1.95.0",
    "pool/main/r/rustc/rust-src_1.95.0+dfsg1-2_all.deb",
    "8e39f55364384322c334f8453c1914b49de94c5a7eca02b427861a624d95854a",
)];

const CONFIG: &str = ".cargo/sysroot.toml";

/// Makes the bare-metal target usable from this checkout; quick when there is nothing to do.
///
/// # Errors
/// The source of this compiler's libraries cannot be found or built.
pub fn ensure_target(sh: &Shell) -> Result<()> {
    if installed(sh)? {
        return Ok(sh.remove_path(CONFIG)?);
    }
    let version = rustc_version::version_meta()?;
    let sysroot = folder(&version)?;
    if !built(&sysroot) {
        let _lock = cache::lock("sysroot")?;
        if !built(&sysroot) {
            build(sh, &sysroot, version)?;
        }
    }
    let flag = sysroot.to_str().context("the path of the cache folder is not UTF-8")?;
    let text = format!(
        "# Written by `cargo xtask provision`.\n[target.{TARGET}]\n\
         rustflags = [\"--sysroot\", {flag:?}]\nrustdocflags = [\"--sysroot\", {flag:?}]\n"
    );
    if fs::read_to_string(sh.current_dir().join(CONFIG)).ok().as_deref() != Some(&text) {
        sh.write_file(CONFIG, text)?;
    }
    Ok(())
}

/// For `doctor`: whether the bare-metal `core` is there, and where it comes from.
///
/// # Errors
/// The compiler does not answer.
pub fn state(sh: &Shell) -> Result<(bool, String)> {
    if installed(sh)? {
        return Ok((true, format!("{TARGET} is installed with the toolchain")));
    }
    let sysroot = folder(&rustc_version::version_meta()?)?;
    Ok(if built(&sysroot) {
        (true, format!("core and alloc for {TARGET} in {}", sysroot.display()))
    } else {
        (false, format!("the toolchain lacks {TARGET}: core and alloc would be built once from source (45 MB fetched)"))
    })
}

/// The cache is keyed by the compiler's commit: its libraries fit no other.
fn folder(version: &rustc_version::VersionMeta) -> Result<PathBuf> {
    let hash = version.commit_hash.as_deref().unwrap_or(&version.short_version_string);
    Ok(cache::dir()?.join("sysroot").join(hash))
}

fn built(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib").join(TARGET).join("lib").is_dir()
}

fn build(sh: &Shell, sysroot: &Path, version: rustc_version::VersionMeta) -> Result<()> {
    let source = source(sh, &version)?;
    eprintln!("building core and alloc for {TARGET} (once for this compiler)");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The library needs unstable features; this is the only place where they are switched on.
    cargo.env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo.env_remove("CARGO_TARGET_DIR");
    fs::create_dir_all(sysroot)?;
    SysrootBuilder::new(sysroot, TARGET)
        .sysroot_config(SysrootConfig::NoStd)
        .cargo(cargo)
        .rustc_version(version)
        // Fat LTO through core needs the bitcode; a kernel has no unwinder.
        .rustflags(["-Cembed-bitcode=yes", "-Cpanic=abort", "-Cdebuginfo=line-tables-only"])
        .build_from_source(&source)?;
    ensure!(built(sysroot), "the build of core left nothing in {}", sysroot.display());
    Ok(())
}

/// Whether the toolchain itself has the target.
fn installed(sh: &Shell) -> Result<bool> {
    let rustc = rustc();
    let libs = PathBuf::from(cmd!(sh, "{rustc} --print target-libdir --target {TARGET}").quiet().read()?);
    let is_core = |file: fs::DirEntry| file.file_name().to_string_lossy().starts_with("libcore-");
    Ok(fs::read_dir(libs).is_ok_and(|dir| dir.flatten().any(is_core)))
}

/// The `library` folder of this compiler's source.
fn source(sh: &Shell, version: &rustc_version::VersionMeta) -> Result<PathBuf> {
    if let Some(given) = env::var_os("RUST_SRC_PATH") {
        return Ok(given.into());
    }
    let component = rustc_build_sysroot::rustc_sysroot_src(Command::new(rustc()))?;
    if component.join("core/Cargo.toml").is_file() {
        return Ok(component);
    }
    let number = version.semver.to_string();
    debian_source(sh, &number).with_context(|| {
        format!(
            "no `core` for {TARGET}: run `rustup target add {TARGET}`, \
             or set RUST_SRC_PATH to the `library` folder of rustc {number}"
        )
    })
}

/// Takes `rust-src` from the Debian archive this machine already uses.
fn debian_source(sh: &Shell, version: &str) -> Result<PathBuf> {
    let library = cache::dir()?.join("rust-src").join(version).join("library");
    if library.is_dir() {
        return Ok(library);
    }
    let archive = apt::archive(sh)?;
    let scratch = cache::scratch()?;
    let (path, sha256) = match PINNED.iter().find(|(pinned, ..)| *pinned == version) {
        Some((_, path, sha256)) => ((*path).to_owned(), (*sha256).to_owned()),
        None => indexed(sh, version, scratch.path())?,
    };
    eprintln!("fetching the source of rustc {version}'s libraries (45 MB, once)");
    let deb = scratch.path().join("rust-src.deb");
    apt::download(sh, &format!("{archive}{path}"), &deb, &sha256)?;
    let unpacked = scratch.path().join("rust-src");
    apt::extract(sh, &deb, &unpacked)?;
    // Only `library` stays: a tenth of the package.
    cache::publish(&unpacked.join(format!("usr/src/rustc-{version}/library")), &library)
        .context("unexpected layout of rust-src")?;
    Ok(library)
}

/// Looks `version` up in the signed indexes of the archive's living suites.
fn indexed(sh: &Shell, version: &str, dir: &Path) -> Result<(String, String)> {
    let suites = ["stable", "testing", "unstable"];
    let lists = apt::Lists::update(sh, dir, &suites, apt::Installed::Nothing)?;
    let records = lists.records(sh, "rust-src")?;
    let mut seen = Vec::new();
    for record in &records {
        let packaged = record.field("Version")?;
        if packaged.split(['+', '~', '-']).next() == Some(version) {
            return Ok((record.field("Filename")?.to_owned(), record.field("SHA256")?.to_owned()));
        }
        seen.push(packaged);
    }
    bail!("the Debian archive has no rust-src {version}; it has: {}", seen.join(", "))
}

fn rustc() -> OsString {
    env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())
}
