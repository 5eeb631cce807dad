//! A guest with Debian: packages that mmdebstrap installs, an ext4 file system that mke2fs makes of them, and a file that
//! describes the guest.
//!
//! Files of a distribution have many owners, so somebody who may be all of them unpacks them: root, or the root of a user
//! namespace, which has the host user's range of user ids (`/etc/subuid`). Nothing is installed on the host.

use crate::{bootstrap, build, cache, ext4, guest_file, kernels, mebibytes, seed, ssh};
use anyhow::{Context, Result, bail, ensure};
use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::NamedTempFile;
use xshell::{Shell, cmd};

/// A release of Debian that a guest can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Suite {
    /// Debian 12, with the kernel 6.1
    Bookworm,
    /// Debian 13, with the kernel 6.12
    Trixie,
}

impl Suite {
    /// The name in an archive.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }

    /// The suite's stock kernel.
    const fn kernel(self) -> &'static str {
        match self {
            Self::Bookworm => "6.1",
            Self::Trixie => "6.12",
        }
    }
}

/// What a guest can have beside the usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Extra {
    /// The real cloud-init, which reads seeds and does more with them than the guest's own small program
    CloudInit,
}

/// What a guest's disk holds.
#[derive(Clone, Debug, clap::Args)]
pub struct Recipe {
    /// The release of Debian
    #[arg(long, value_enum, default_value_t = Suite::Bookworm)]
    pub suite: Suite,
    /// More packages, separated by commas. Can be repeated
    #[arg(long, value_name = "PACKAGES", value_delimiter = ',', value_parser = package)]
    pub packages: Vec<String>,
    /// Something that the guest has beside the usual. Can be repeated
    #[arg(long, value_enum, value_name = "WHAT")]
    pub with: Vec<Extra>,
    /// Size of the disk, in MiB or with a suffix: 4G
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = |text: &str| mebibytes(text, 1024))]
    pub size: u32,
}

impl Default for Recipe {
    fn default() -> Self {
        Self { suite: Suite::Bookworm, packages: Vec::new(), with: Vec::new(), size: 4 << 10 }
    }
}

/// A package's name (Debian policy 5.6.1).
fn package(text: &str) -> Result<String, String> {
    let name = text.trim();
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c);
    match name.len() > 1 && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(allowed) {
        true => Ok(name.to_owned()),
        false => Err(format!("{name:?} is no name of a package")),
    }
}

/// Devices with any name ask for addresses: kernels name the device of a vif `eth0` or `enX0`.
const NETWORK: &str = "[Match]\nType=ether\n\n[Network]\nDHCP=yes\n";
/// Each guest makes a host key of its own when it first starts. `ssh-keygen -A` would make one of each kind, and looking for
/// the primes of an RSA key takes a third of the instructions of a first boot.
const HOST_KEYS: &str = "[Service]
ExecStartPre=
ExecStartPre=/bin/sh -c 'cd /etc/ssh; test -s ssh_host_ed25519_key || \\
    { rm -f ssh_host_ed25519_key; exec ssh-keygen -q -t ed25519 -N \"\" -f ssh_host_ed25519_key; }'
ExecStartPre=/usr/sbin/sshd -t
";
/// A kernel that is alone on a machine calls the disk otherwise than a guest does.
const FSTAB: &str = "LABEL=debian / ext4 errors=remount-ro 0 1\n";

/// What cloud-init is told: a seed on a disk is all that there is, root is entered with the key of xtask, apt has its sources,
/// and no locale need be made.
const CLOUD_INIT: &str = "datasource_list: [NoCloud, None]\ndisable_root: false\nlocale: C.UTF-8\n\
                          apt: {preserve_sources_list: true}\n";

/// Unpacks the archive `$1` into the folder `$2`, except device nodes, which the root of a user namespace cannot make and the
/// kernel provides. Lays the files below `$3` over it as root's, and lists the modules of the kernel `$4`. Then makes a file
/// system of the folder in the file `$6` by the program `$5`, and removes the folder.
const UNPACK: &str = r#"trap 'rm -rf --one-file-system "$2"' EXIT
PATH=$PATH:/usr/sbin:/sbin
tar --extract --preserve-permissions --numeric-owner --exclude './dev/*' --file "$1" --directory "$2"
cp --archive --no-preserve=ownership --remove-destination "$3/." "$2"
chroot "$2" /usr/sbin/depmod "$4"
"$5" -q -F -t ext4 -L debian -d "$2" "$6""#;

/// A disk with Debian, and the file that describes its guest.
#[derive(Clone, Debug)]
pub struct Image {
    /// The disk, a raw file.
    pub disk: PathBuf,
    /// The guest's description, for `cargo xtask run`.
    pub guest: PathBuf,
}

impl Image {
    /// The disk at `disk`, and the guest's description beside it.
    ///
    /// # Errors
    /// The path names no file, or one that a description cannot name.
    pub fn at(disk: &Path) -> Result<Self> {
        let name = disk.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let plain = !name.is_empty() && !name.contains([',', '"', '\\', ':']) && !name.ends_with(".toml");
        ensure!(plain && !name.chars().any(char::is_control), "{}: no name for a disk", disk.display());
        Ok(Self { disk: disk.to_owned(), guest: disk.with_extension("toml") })
    }

    /// The one that `cargo xtask run --guest debian` starts: in Cargo's target folder.
    ///
    /// # Errors
    /// Cargo names no such folder.
    pub fn usual(sh: &Shell) -> Result<Self> {
        Self::at(&build::target_dir(sh)?.join("debian.img"))
    }

    /// Makes disk and description. Neither may be there. If this fails, nothing is left of either.
    ///
    /// # Errors
    /// Why Debian cannot be fetched or installed.
    pub fn make(&self, sh: &Shell, recipe: &Recipe) -> Result<()> {
        for file in [&self.disk, &self.guest] {
            ensure!(!file.exists(), "{} is there already", file.display());
        }
        let folder = self.disk.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        ensure!(folder.is_dir(), "no folder for {}", self.disk.display());
        let made = cached(sh, recipe)?;
        // In the folder of the disk, so that the finished disk is renamed into place.
        let scratch = tempfile::Builder::new().prefix("part-").tempdir_in(folder)?;
        let staging = scratch.path().join("disk");
        copy(sh, &made, &staging).with_context(|| format!("cannot make {}", self.disk.display()))?;
        fs::write(&self.guest, self.description(recipe))?;
        fs::rename(&staging, &self.disk).inspect_err(|_| drop(fs::remove_file(&self.guest)))?;
        Ok(())
    }

    /// Returns a file with the description of the guest as it is to be this time. With an `overlay`, it leaves the disk as it
    /// is: what the guest writes is kept in at most so many MiB of memory, and is lost with the guest. With a `kernel`, it
    /// starts from this one, without a ramdisk. The file is removed when it is dropped.
    ///
    /// # Errors
    /// The guest's description is wrong, or does not name one disk for the overlay; or a description cannot name the kernel.
    pub fn changed(&self, sh: &Shell, overlay: Option<u32>, kernel: Option<&Path>) -> Result<NamedTempFile> {
        let mut guest = guest_file::read(sh, &[&self.guest])?.pop().context("a file is a guest")?.config;
        if let Some(mib) = overlay {
            let [disk] = guest.disk.as_mut_slice() else {
                bail!("{}: --overlay is for a guest with one disk", self.guest.display());
            };
            disk.overlay = Some(u64::from(mib) << 20);
        }
        if let Some(kernel) = kernel {
            let path = std::path::absolute(kernel)?;
            guest.kernel = path.to_str().with_context(|| format!("{}: no text", kernel.display()))?.to_owned();
            guest.ramdisk = None;
        }
        // In the folder of the other: paths in a description start there.
        let folder = self.guest.parent().context("a description in no folder")?;
        let mut file = tempfile::Builder::new().prefix("part-").suffix(".toml").tempfile_in(folder)?;
        file.write_all(guest.to_toml().as_bytes())?;
        Ok(file)
    }

    fn description(&self, recipe: &Recipe) -> String {
        let disk = self.disk.file_name().unwrap_or_default().to_string_lossy();
        let (suite, kernel) = (recipe.suite.name(), recipe.suite.kernel());
        format!(
            "# Debian {suite}, whose disk `cargo xtask image debian` has made.\n\
             name = \"debian\"\n\
             kernel = \"{kernel}\"\n\
             extra = \"console=hvc0 root=/dev/xvda\"\n\
             memory = 512\n\
             on_reboot = \"restart\"\n\
             disk = [\"{disk},,xvda,w\"]\n\
             vif = [\"\"]\n"
        )
    }
}

/// Who unpacks files with many owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// Root of this machine.
    Root,
    /// The root of a user namespace.
    Namespace,
}

impl User {
    /// Finds out who can.
    ///
    /// # Errors
    /// Nobody can: what is missing.
    pub fn find() -> Result<Self> {
        if fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0) {
            return Ok(Self::Root);
        }
        let output = Self::Namespace.command("true").output().context("cannot start unshare (package util-linux)")?;
        let why = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "files of a distribution have many owners, and this user can be one alone ({}): be root, or install the package \
             uidmap and have ranges in /etc/subuid and /etc/subgid",
            why.trim_end()
        );
        Ok(Self::Namespace)
    }

    /// How the user is told of it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Namespace => "the root of a user namespace",
        }
    }

    /// How mmdebstrap calls it.
    pub(crate) const fn mode(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Namespace => "unshare",
        }
    }

    /// A command that this user carries out.
    pub(crate) fn command(self, program: &str) -> Command {
        match self {
            Self::Root => Command::new(program),
            Self::Namespace => {
                let mut command = Command::new("unshare");
                command.args(["--map-root-user", "--map-auto", "--", program]);
                command
            }
        }
    }
}

/// Returns the disk of this recipe as it is before a guest has started from it: of the cache, or made now. Nobody may write it.
///
/// # Errors
/// Why Debian cannot be fetched or installed.
pub fn cached(sh: &Shell, recipe: &Recipe) -> Result<PathBuf> {
    let user = User::find()?;
    let archive = bootstrap::archive(sh, recipe, user)?;
    let kernel = kernels::stock(sh, recipe.suite.kernel())?.version()?;
    let files = files(recipe, &ssh::Client::find(sh)?)?;
    let mut hasher = DefaultHasher::new();
    (&archive, recipe.size, kernel, kernels::SYSTEM_MODULES, UNPACK, &files).hash(&mut hasher);
    let target = cache::dir()?.join("debian").join(format!("{}-{:016x}.img", recipe.suite.name(), hasher.finish()));
    if cache::has(&target) {
        return Ok(target);
    }
    let _lock = cache::lock("debian")?;
    if cache::has(&target) {
        return Ok(target);
    }
    let (name, size) = (recipe.suite.name(), recipe.size);
    eprintln!("making the file system of Debian {name} ({size} MiB) as {}", user.name());
    let scratch = cache::scratch()?;
    let staging = scratch.path().join("disk");
    file_system(sh, recipe, user, &archive, &files, scratch.path())?;
    cache::publish_by_content(&staging, &target)?;
    Ok(target)
}

/// Copies a disk, without the blocks that hold nothing.
fn copy(sh: &Shell, from: &Path, to: &Path) -> Result<()> {
    let copied = cmd!(sh, "cp --sparse=always --reflink=auto {from} {to}").quiet().ignore_status().output()?;
    ensure!(copied.status.success(), "{}", reason(&copied.stderr));
    Ok(())
}

/// Why programs failed, in one line: that there is no room, if one of them said so.
fn reason(said: &[u8]) -> String {
    const FULL: &str = "No space left on device";
    let said = String::from_utf8_lossy(said);
    let full = said.lines().any(|line| line.contains(FULL));
    if full { format!("{FULL} of this machine") } else { said.lines().next().unwrap_or_default().to_owned() }
}

/// Makes the file system of an installed Debian in the file `disk` of the empty folder `scratch`.
fn file_system(
    sh: &Shell,
    recipe: &Recipe,
    user: User,
    archive: &Path,
    files: &[(&str, String, u32)],
    scratch: &Path,
) -> Result<()> {
    let (root, over, image) = (scratch.join("root"), scratch.join("over"), scratch.join("disk"));
    fs::create_dir(&root)?;
    let release = lay_out(sh, recipe, files, &over)?;
    File::create(&image)?.set_len(u64::from(recipe.size) << 20)?;
    let tools = ext4::Tools::find(sh)?;
    let mut command = user.command("sh");
    command.args(["-euc", UNPACK, "sh"]).arg(archive).arg(&root).arg(&over).arg(release);
    command.arg(tools.maker()?).arg(&image).envs(tools.environment());
    let output = command.output()?;
    ensure!(output.status.success(), "cannot make the file system: {}", reason(&output.stderr));
    tools.check(&image).context("the new file system")
}

/// The files that a guest has beside those of packages and modules: names, contents, and modes.
fn files(recipe: &Recipe, client: &ssh::Client) -> Result<Vec<(&'static str, String, u32)>> {
    let mut files = vec![
        ("etc/hostname", "debian\n".to_owned(), 0o644),
        ("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 debian\n::1 localhost ip6-localhost\n".to_owned(), 0o644),
        ("etc/fstab", FSTAB.to_owned(), 0o644),
        ("etc/systemd/network/80-vif.network", NETWORK.to_owned(), 0o644),
        ("etc/systemd/system/ssh.service.d/keys.conf", HOST_KEYS.to_owned(), 0o644),
        ("root/.ssh/authorized_keys", client.public()?, 0o600),
        ("usr/lib/tenon/seed", seed::PROGRAM.to_owned(), 0o755),
    ];
    files.extend(seed::UNITS.map(|(name, text)| (name, text.to_owned(), 0o644)));
    if recipe.with.contains(&Extra::CloudInit) {
        files.push(("etc/cloud/cloud.cfg.d/90-tenon.cfg", CLOUD_INIT.to_owned(), 0o644));
    }
    Ok(files)
}

/// Writes what the guest has beside packages below the folder `over`. Returns the kernel's release.
fn lay_out(sh: &Shell, recipe: &Recipe, files: &[(&str, String, u32)], over: &Path) -> Result<String> {
    for (name, text, mode) in files {
        let file = over.join(name);
        fs::create_dir_all(file.parent().context("no folder")?)?;
        fs::write(&file, text)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(*mode))?;
    }
    for (folder, mode) in [("root", 0o700), ("root/.ssh", 0o700)] {
        fs::set_permissions(over.join(folder), fs::Permissions::from_mode(mode))?;
    }
    let wanted = over.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir(&wanted)?;
    symlink("../tenon-seed.service", wanted.join("tenon-seed.service"))?;
    symlink("../run/systemd/resolve/stub-resolv.conf", over.join("etc/resolv.conf"))?;
    // `/lib` is a link into `/usr`.
    let (tree, target) = (kernels::all_modules(sh, recipe.suite.kernel())?, over.join("usr/lib/modules"));
    fs::create_dir_all(&target)?;
    let copied = cmd!(sh, "cp -r {tree}/. {target}").quiet().ignore_status().output()?;
    ensure!(copied.status.success(), "cannot copy the kernel's modules: {}", reason(&copied.stderr));
    let releases = fs::read_dir(&tree)?.collect::<Result<Vec<_>, _>>()?;
    let release = releases.first().context("modules without a release")?.file_name();
    release.into_string().ok().context("a release that is no text")
}

#[cfg(test)]
mod tests {
    use super::*;
    use toolstack::config::GuestConfig;

    #[test]
    fn descriptions_are_guests() {
        for suite in [Suite::Bookworm, Suite::Trixie] {
            let image = Image::at(Path::new("/some/where/my disk.img")).unwrap();
            assert_eq!(image.guest, Path::new("/some/where/my disk.toml"));
            let text = image.description(&Recipe { suite, ..Recipe::default() });
            let config = GuestConfig::parse(&text).unwrap();
            assert_eq!((config.kernel.as_str(), config.disk.len()), (suite.kernel(), 1));
            assert!(kernels::names().any(|name| name == config.kernel), "{}", config.kernel);
        }
    }

    #[test]
    fn an_overlay_leaves_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let sh = Shell::new().unwrap();
        let image = Image::at(&folder.path().join("debian.img")).unwrap();
        fs::write(&image.disk, [0; 4096]).unwrap();
        let kernel = folder.path().join("kernel");
        fs::write(&kernel, test_kernels::halting()).unwrap();
        let text = image.description(&Recipe::default()).replace("\"6.1\"", "\"kernel\"");
        fs::write(&image.guest, &text).unwrap();
        let file = image.changed(&sh, Some(64), None).unwrap();
        let guest = guest_file::read(&sh, &[file.path()]).unwrap().pop().unwrap();
        let [disk] = guest.config.disk.as_slice() else { panic!("{:?}", guest.config.disk) };
        assert_eq!((disk.overlay, disk.writes_target()), (Some(64 << 20), false));
        let other = folder.path().join("other");
        fs::write(&other, test_kernels::halting()).unwrap();
        let changed = image.changed(&sh, None, Some(&other)).unwrap();
        let guest = guest_file::read(&sh, &[changed.path()]).unwrap().pop().unwrap();
        assert_eq!((&guest.kernel, guest.config.disk[0].overlay), (&other, None));
        let path = file.path().to_owned();
        drop(file);
        assert!(!path.exists());
        fs::write(&image.guest, text.replace("disk", "#")).unwrap();
        let why = image.changed(&sh, Some(64), None).unwrap_err().to_string();
        assert_eq!(why, format!("{}: --overlay is for a guest with one disk", image.guest.display()));
    }

    #[test]
    fn names_that_a_description_cannot_hold_are_refused() {
        for name in ["", "/", "a,b.img", "a\"b.img", "a:b.img", "a\\b.img", "a.toml", "a\nb.img"] {
            let why = Image::at(Path::new(name)).unwrap_err().to_string();
            assert!(why.ends_with("no name for a disk"), "{name}: {why}");
        }
    }

    #[test]
    fn what_is_there_is_not_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let sh = Shell::new().unwrap();
        let image = Image::at(&folder.path().join("debian.img")).unwrap();
        for file in [&image.disk, &image.guest] {
            fs::write(file, "mine").unwrap();
            let why = image.make(&sh, &Recipe::default()).unwrap_err().to_string();
            assert_eq!(why, format!("{} is there already", file.display()));
            assert_eq!(fs::read(file).unwrap(), b"mine");
            fs::remove_file(file).unwrap();
        }
        let image = Image::at(&folder.path().join("none/debian.img")).unwrap();
        let why = image.make(&sh, &Recipe::default()).unwrap_err().to_string();
        assert_eq!(why, format!("no folder for {}", image.disk.display()));
    }

    #[test]
    fn names_of_packages_are_examined() {
        assert_eq!(package(" g++ "), Ok("g++".to_owned()));
        for name in ["", "a", "-o", "Vim", "vim;reboot", "a b", "über"] {
            assert!(package(name).is_err(), "{name}");
        }
    }
}
