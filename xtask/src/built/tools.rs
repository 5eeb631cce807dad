//! What a kernel build needs beside a C compiler.

use crate::apt::{self, Programs};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use xshell::Shell;

/// What a kernel build needs beside a C compiler.
pub(super) const TOOLS: Programs = Programs {
    kind: "kernel-tools",
    packages: &["flex", "bison", "m4", "make", "bc", "patch", "libelf-dev"],
    why: "to build kernels",
    complete: |root| {
        ["usr/bin/flex", "usr/bin/bison", "usr/bin/m4", "usr/bin/make", "usr/bin/bc", "usr/bin/patch"]
            .iter()
            .chain(&["usr/include/libelf.h"])
            .all(|file| root.join(file).is_file())
    },
};

/// The folder below which the tools lie, fetched first if need be.
pub(crate) fn ready(sh: &Shell) -> Result<PathBuf> {
    let tools = TOOLS.find(sh)?;
    mend_links(&tools, Path::new("/"))?;
    Ok(tools)
}

/// `make`, which finds the other tools below `tools`. Nothing of the user's has a say.
pub(crate) fn command(tools: &Path) -> Command {
    let mut command = apt::command(tools, &tools.join("usr/bin/make"));
    if tools != Path::new("/") {
        let mut path = tools.join("usr/bin").into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin")));
        command.env("PATH", path);
        command.env("M4", tools.join("usr/bin/m4")).env("BISON_PKGDATADIR", tools.join("usr/share/bison"));
        command.env("C_INCLUDE_PATH", tools.join("usr/include"));
        command.env("LIBRARY_PATH", tools.join("usr/lib/x86_64-linux-gnu"));
    }
    for name in ["MAKEFLAGS", "MFLAGS", "CFLAGS", "KCFLAGS", "ARCH", "CROSS_COMPILE"] {
        command.env_remove(name);
    }
    command
}

/// Makes links below `tools` to libraries that are not there lead to those of the machine, whose root is `machine`: what the
/// machine has is not fetched. The linker would take the static form instead, which wants more libraries.
fn mend_links(tools: &Path, machine: &Path) -> Result<()> {
    const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
    if tools == machine {
        return Ok(());
    }
    for entry in fs::read_dir(tools.join(LIBRARIES))? {
        let link = entry?.path();
        let Ok(target) = fs::read_link(&link) else { continue };
        let installed = machine.join(LIBRARIES).join(target);
        if !link.exists() && installed.exists() {
            fs::remove_file(&link)?;
            std::os::unix::fs::symlink(&installed, &link)
                .with_context(|| format!("cannot make the link {}", link.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_to_libraries_of_the_machine_are_mended() {
        let [tools, machine] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let libraries = |root: &Path| root.join("usr/lib/x86_64-linux-gnu");
        for root in [tools.path(), machine.path()] {
            fs::create_dir_all(libraries(root)).unwrap();
        }
        fs::write(libraries(machine.path()).join("a.so.1"), "a").unwrap();
        for (link, target) in [("a.so", "a.so.1"), ("b.so", "b.so.1")] {
            std::os::unix::fs::symlink(target, libraries(tools.path()).join(link)).unwrap();
        }
        mend_links(tools.path(), machine.path()).unwrap();
        assert_eq!(fs::read_to_string(libraries(tools.path()).join("a.so")).unwrap(), "a");
        assert!(!libraries(tools.path()).join("b.so").exists());
    }
}
