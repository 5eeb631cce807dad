//! The emulated machine: how it is put together and what its end means.

use crate::qemu::{self, Qemu};
use hypercall_abi::sched::ShutdownReason;
use std::path::Path;
use std::process::{Command, ExitStatus};

pub use toolstack::bundle::ANSWER;
pub use toolstack::status::Failure;

/// Where the machine's first serial line leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// To standard input and output as they are.
    Plain,
    /// To a terminal: Ctrl-C belongs to the guest, and Ctrl-A X ends the machine.
    Terminal,
}

/// A command that boots `hypervisor` (an ELF file) with the archive `bundle` in `memory` MiB.
///
/// `options` is the hypervisor's own command line. The machine has one serial line, and a device at port 0xf4
/// through which the hypervisor ends it: see [`End`].
#[must_use]
pub fn command(qemu: &Qemu, memory: u32, hypervisor: &Path, bundle: &Path, options: &str, console: Console) -> Command {
    let mut command = empty(qemu, memory, console);
    command.arg("-kernel").arg(hypervisor).arg("-initrd").arg(bundle).arg("-append").arg(options);
    command
}

/// How an image made by [`crate::grub`] is put into a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A CD in its drive.
    Cd,
    /// A disk, as on a stick.
    Disk,
}

/// A command that lets the machine's own firmware boot `iso`: BIOS, or the UEFI firmware in the file `uefi`.
#[must_use]
pub fn firmware_command(
    qemu: &Qemu,
    memory: u32,
    iso: &Path,
    medium: Medium,
    uefi: Option<&Path>,
    console: Console,
) -> Command {
    let mut command = empty(qemu, memory, console);
    if let Some(firmware) = uefi {
        command.arg("-bios").arg(firmware);
    }
    // A comma in an option's value is written twice.
    let file = iso.as_os_str().to_string_lossy().replace(',', ",,");
    command.arg("-drive").arg(match medium {
        Medium::Cd => format!("media=cdrom,readonly=on,format=raw,file={file}"),
        Medium::Disk => format!("media=disk,snapshot=on,format=raw,file={file}"),
    });
    command
}

/// A machine with nothing to boot.
fn empty(qemu: &Qemu, memory: u32, console: Console) -> Command {
    let mut command = qemu.command();
    command.args(qemu::accelerator());
    command.args(["-m", &memory.to_string(), "-nodefaults", "-display", "none", "-no-reboot"]);
    command.arg("-chardev").arg(match console {
        Console::Plain => "stdio,id=com1",
        Console::Terminal => "stdio,id=com1,mux=on,signal=off",
    });
    command.args(["-serial", "chardev:com1", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
    command
}

/// Why a machine ended. Writing `v` to port 0xf4 ends QEMU with the status `2v + 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The hypervisor wrote 0x10: everything that was asked for went well.
    Success,
    /// The hypervisor wrote 0x11: it panicked, or found nothing to start.
    Panic,
    /// The hypervisor wrote 0x20 and more: the first domain ended for this reason, which was not a good one.
    First(u32),
    /// The machine was reset or switched off without a word from the hypervisor.
    Reset,
    /// QEMU itself refused to start or gave up.
    Emulator,
    /// The hypervisor wrote another value, or QEMU was killed by a signal (`None`).
    Other(Option<i32>),
}

impl End {
    /// The meaning of QEMU's exit status.
    #[must_use]
    pub fn of(status: ExitStatus) -> Self {
        match status.code() {
            Some(33) => Self::Success,
            Some(35) => Self::Panic,
            Some(code @ 65..=127) if code % 2 == 1 => Self::First(u32::try_from(code / 2).unwrap_or(0) & 0x1f),
            Some(0) => Self::Reset,
            Some(1) => Self::Emulator,
            other => Self::Other(other),
        }
    }

    /// One line for the user.
    #[must_use]
    pub fn explanation(self) -> String {
        match self {
            Self::Success => "the machine ended in good order".into(),
            Self::Panic => "the hypervisor panicked, or had nothing to start: see the console above".into(),
            Self::First(reason) => match ShutdownReason::from_number(u64::from(reason)) {
                Some(ShutdownReason::Crash) => "the first domain crashed: see the console above".into(),
                Some(reason) => format!("the first domain ended: {}", reason.name().to_lowercase()),
                None => format!("the first domain ended for the reason {reason}"),
            },
            Self::Reset => "the machine was reset without a word from the hypervisor (a triple fault?)".into(),
            Self::Emulator => "QEMU could not run the machine: see its message above".into(),
            Self::Other(Some(code)) => format!("the machine ended with the unknown status {code}"),
            Self::Other(None) => "QEMU was killed".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn every_status_has_its_meaning() {
        let exited = |code: i32| End::of(ExitStatus::from_raw(code << 8));
        assert_eq!(exited(33), End::Success);
        assert_eq!(exited(35), End::Panic);
        assert_eq!(exited(2 * (0x20 + 3) + 1), End::First(3));
        assert_eq!(exited(2 * (0x20 + 21) + 1), End::First(21));
        assert_eq!(exited(66), End::Other(Some(66)));
        assert_eq!(exited(0), End::Reset);
        assert_eq!(exited(1), End::Emulator);
        assert_eq!(exited(5), End::Other(Some(5)));
        assert_eq!(End::of(ExitStatus::from_raw(9)), End::Other(None));
    }
}
