//! The kernel's own tests of x86 and of memory management: static programs for a guest, built from the source of
//! [`crate::built`].
//!
//! The source's own makefiles say which programs there are. Those that cannot be built are left out and named; the 32-bit forms
//! are left out as well, as they want a second C library.

use crate::apt::Programs;
use crate::built::{self, Source, tools};
use crate::cache;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use xshell::{Shell, cmd};

/// The folders of tests that are built.
const FOLDERS: [&str; 2] = ["x86", "mm"];
/// Static, without symbols; and what a file of 6.12 uses and does not include.
const FLAGS: &str = "-static -s -DKSFT_SKIP=4";
/// The file with what was left out.
const LEFT_OUT: &str = "left-out";
/// The folder of the programs in a guest, and the program there that runs the others.
const GUEST_FOLDER: &str = "selftests";
const RUNNER: &str = include_str!("selftests.sh");
/// What a shell in a guest is told to run the tests.
pub const COMMAND: &str = "/selftests/run";

/// The tests that the source's `run_vmtests.sh` runs with arguments, or more than once. Others have no arguments.
const ARGUMENTS: &[(&str, &[&str])] = &[
    ("mm/gup_test", &["-u", "-a", "-ct -F 0x1 0 19 0x1000"]),
    ("mm/ksm_tests", &["-H -s 100", "-P -s 100", "-M -p 10", "-U", "-Z -p 10 -z 0", "-Z -p 10 -z 1"]),
    ("mm/transhuge-stress", &["-d 20"]),
    ("mm/uffd-stress", &["anon 20 16", "shmem 20 16", "shmem-private 20 16"]),
];

/// Programs that scripts start for a test of theirs, and tests that harm the machine.
const NO_TESTS: [&str; 3] = ["mm/write_to_hugetlbfs", "mm/hugetlb-soft-offline", "mm/hugetlb-read-hwpoison"];

/// Libraries that some tests are linked with.
const LIBRARIES: Programs = Programs {
    kind: "selftest-libraries",
    packages: &["libcap-dev", "libnuma-dev", "liburing-dev"],
    why: "to build the kernel's selftests",
    complete: |root| {
        ["libcap.a", "libnuma.a", "liburing.a"]
            .iter()
            .all(|file| root.join("usr/lib/x86_64-linux-gnu").join(file).is_file())
    },
};

/// The tests, as they are built.
#[derive(Clone, Debug)]
pub struct Selftests {
    /// The programs, by their folder and name.
    programs: BTreeMap<String, Vec<u8>>,
    /// Those that cannot be built, with the reason.
    pub left_out: Vec<String>,
}

impl Selftests {
    /// The tests of [`built::DEFAULT`], built first if need be.
    ///
    /// # Errors
    /// The source or what a build needs cannot be fetched, or nothing can be built.
    pub fn find(sh: &Shell) -> Result<Self> {
        let source = Source::find(sh, built::DEFAULT)?;
        let compiler = cmd!(sh, "gcc --version").quiet().read().context("the selftests need gcc")?;
        let mut hasher = DefaultHasher::new();
        (&source.package, compiler, FOLDERS, FLAGS).hash(&mut hasher);
        let folder = cache::dir()?.join("selftests").join(format!("{:016x}", hasher.finish()));
        if !cache::has(&folder) {
            let _lock = cache::lock("selftests")?;
            if !cache::has(&folder) {
                build(sh, &source, &folder).context("cannot build the kernel's selftests")?;
            }
        }
        let left_out = fs::read_to_string(folder.join(LEFT_OUT))?.lines().map(str::to_owned).collect();
        let mut programs = BTreeMap::new();
        for name in FOLDERS {
            for file in executables(&folder.join(name))? {
                let base = file.file_name().and_then(|base| base.to_str()).context("a test without a name")?;
                programs.insert(format!("{name}/{base}"), fs::read(&file)?);
            }
        }
        Ok(Self { programs, left_out })
    }

    /// What is run: a program and its arguments each.
    #[must_use]
    pub fn list(&self) -> Vec<String> {
        let tests = self.programs.keys().filter(|name| !NO_TESTS.contains(&name.as_str()));
        tests.flat_map(|name| lines(name)).collect()
    }

    /// The files of a guest that runs the tests when [`COMMAND`] is carried out, by their names.
    #[must_use]
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let list = self.list().iter().map(|line| format!("{line}\n")).collect::<String>();
        let mut files = BTreeMap::from([("run".to_owned(), RUNNER.into()), ("list".to_owned(), list.into_bytes())]);
        files.extend(self.programs.clone());
        files.into_iter().map(|(name, file)| (format!("{GUEST_FOLDER}/{name}"), file)).collect()
    }
}

/// How a program is run.
fn lines(name: &str) -> Vec<String> {
    match ARGUMENTS.iter().find(|(program, _)| *program == name) {
        Some((_, all)) => all.iter().map(|arguments| format!("{name} {arguments}")).collect(),
        None => vec![name.to_owned()],
    }
}

fn executables(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let is_program =
        |file: &PathBuf| file.metadata().is_ok_and(|of| of.is_file() && of.permissions().mode() & 0o111 != 0);
    Ok(files.into_iter().filter(is_program).collect())
}

/// Builds the tests into the folder `target` of the cache.
fn build(sh: &Shell, source: &Source, target: &Path) -> Result<()> {
    let (tools, libraries) = (tools::ready(sh)?, LIBRARIES.find(sh)?);
    let scratch = cache::scratch()?;
    let (tree, headers, staging) =
        (scratch.path().join("tree"), scratch.path().join("headers"), scratch.path().join("selftests"));
    let from = &source.tree;
    // Links: the makefiles write new files only.
    cmd!(sh, "cp -al {from} {tree}").quiet().run().context("cannot copy the kernel source")?;
    eprintln!("building the selftests of {} (a minute)", source.package);
    let mut make = tools::command(&tools);
    make.arg("-C").arg(&tree).arg(format!("O={}", headers.display())).args(["-s", "headers"]);
    let said = run(&mut make)?;
    let include = headers.join("usr/include");
    ensure!(include.join("linux/unistd.h").is_file(), "no headers: {}", said.lines().last().unwrap_or_default());
    let mut left_out = String::new();
    for name in FOLDERS {
        let output = staging.join(name);
        fs::create_dir_all(&output)?;
        let mut make = tools::command(&tools);
        make.arg("-C").arg(tree.join("tools/testing/selftests").join(name));
        make.args(["-k", "-j2", "--output-sync=target", "CAN_BUILD_I386=0", "all"]).env("EXTRA_CFLAGS", FLAGS);
        make.arg(format!("OUTPUT={}", output.display()));
        make.arg(format!("KHDR_INCLUDES=-isystem {}", include.display()));
        add_path(&mut make, "C_INCLUDE_PATH", &libraries.join("usr/include"));
        add_path(&mut make, "C_INCLUDE_PATH", &libraries.join("usr/include/x86_64-linux-gnu"));
        add_path(&mut make, "LIBRARY_PATH", &libraries.join("usr/lib/x86_64-linux-gnu"));
        for (program, why) in failures(&run(&mut make)?) {
            left_out.push_str(&format!("{name}/{program}: {why}\n"));
        }
        ensure!(!executables(&output)?.is_empty(), "no test of {name} can be built: {left_out}");
    }
    fs::write(staging.join(LEFT_OUT), left_out)?;
    cache::publish_by_content(&staging, target)
}

/// Adds a folder to a list of them in the environment of `command`.
fn add_path(command: &mut Command, name: &str, folder: &Path) {
    let before = command.get_envs().find(|(known, _)| *known == name).and_then(|(_, value)| value);
    let mut value = before.map(ToOwned::to_owned).unwrap_or_default();
    if !value.is_empty() {
        value.push(":");
    }
    value.push(folder);
    command.env(name, value);
}

/// Runs `make`, whatever comes out, and returns what it complains of.
fn run(make: &mut Command) -> Result<String> {
    let output = make.stdin(Stdio::null()).output().context("cannot start make")?;
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The programs that could not be built, with the first complaint of the compiler about each.
fn failures(said: &str) -> Vec<(String, String)> {
    let (mut failures, mut why) = (Vec::new(), None);
    for line in said.lines() {
        if let Some(target) = line.strip_prefix("make: *** [").and_then(|rest| rest.split_once("] Error")) {
            let program = target.0.rsplit('/').next().unwrap_or(target.0).to_owned();
            failures.push((program, why.take().unwrap_or_else(|| "the build failed".to_owned())));
        } else if why.is_none()
            && let Some((_, complaint)) = line.split_once("error: ")
        {
            why = Some(complaint.to_owned());
        }
    }
    failures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_built_is_named_with_the_reason() {
        let said = "khugepaged.c: In function 'main':\n\
                    khugepaged.c:1195:24: error: 'KSFT_SKIP' undeclared (first use in this function)\n\
                    khugepaged.c:1196:24: error: another\n\
                    make: *** [../lib.mk:222: /out/mm/khugepaged] Error 1\n\
                    make: *** [../lib.mk:222: /out/mm/other] Error 2\n\
                    make: Target 'all' not remade because of errors.\n";
        let failures = failures(said);
        let named: Vec<_> = failures.iter().map(|(program, why)| (program.as_str(), why.as_str())).collect();
        let first = "'KSFT_SKIP' undeclared (first use in this function)";
        assert_eq!(named, [("khugepaged", first), ("other", "the build failed")]);
    }

    #[test]
    fn each_test_is_a_line_for_each_set_of_its_arguments() {
        let program = |name: &str| (name.to_owned(), Vec::new());
        let programs = BTreeMap::from(["mm/cow", "mm/uffd-stress", NO_TESTS[0], "x86/iopl_64"].map(program));
        let tests = Selftests { programs, left_out: Vec::new() };
        let uffd = ["anon", "shmem", "shmem-private"].map(|kind| format!("mm/uffd-stress {kind} 20 16"));
        assert_eq!(tests.list(), [&["mm/cow".into()], &uffd[..], &["x86/iopl_64".into()]].concat());
        let files = tests.files();
        assert!(files["selftests/list"].starts_with(b"mm/cow\nmm/uffd-stress anon 20 16\n"));
        assert!(files.contains_key("selftests/mm/cow") && files.contains_key(COMMAND.trim_start_matches('/')));
    }
}
