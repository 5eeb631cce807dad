//! Whose code lies at an address.

/// Whose instruction it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Before anything ran in the upper half: firmware, boot loaders, a kernel that unpacks itself.
    Boot,
    /// Programs of a guest.
    User,
    /// A guest's kernel, or the kernel of the bare machine.
    Kernel,
    /// Our first domain, if its text was named.
    Dom0,
    /// The hypervisor.
    Ring0,
}

/// How many owners there are.
pub(crate) const OWNERS: usize = 5;

impl Owner {
    /// All of them, by number.
    pub(crate) const ALL: [Self; OWNERS] = [Self::Boot, Self::User, Self::Kernel, Self::Dom0, Self::Ring0];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::User => "user",
            Self::Kernel => "kernel",
            Self::Dom0 => "dom0",
            Self::Ring0 => "ring0",
        }
    }
}

/// The lower half: programs, and what runs before there are page tables.
const LOWER: u64 = 1 << 47;
/// The hypervisor's slots end here, Xen's and ours alike (core 2.1).
const HYPERVISOR_END: u64 = 0xffff_8800_0000_0000;

/// Tells owners by address, and remembers whether the upper half has been seen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Owners {
    /// Text of dom0: lowest address and the one after the last.
    pub(crate) dom0: (u64, u64),
    up: bool,
}

impl Owners {
    /// The owner of the code at an address that is translated now.
    pub(crate) fn of(&mut self, address: u64) -> Owner {
        if address < LOWER {
            return if self.up { Owner::User } else { Owner::Boot };
        }
        self.up = true;
        if address < HYPERVISOR_END {
            Owner::Ring0
        } else if (self.dom0.0..self.dom0.1).contains(&address) {
            Owner::Dom0
        } else {
            Owner::Kernel
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_tells_the_owner() {
        let mut owners = Owners { dom0: (0xffff_ffff_8010_0000, 0xffff_ffff_8018_0000), ..Owners::default() };
        assert_eq!(owners.of(0xf_fff0), Owner::Boot);
        assert_eq!(owners.of(0xffff_8280_0020_1000), Owner::Ring0);
        assert_eq!(owners.of(0xffff_82d0_4020_0000), Owner::Ring0);
        assert_eq!(owners.of(0xffff_ffff_8010_0000), Owner::Dom0);
        assert_eq!(owners.of(0xffff_ffff_8018_0000), Owner::Kernel);
        assert_eq!(owners.of(0xffff_8880_0000_0000), Owner::Kernel);
        assert_eq!(owners.of(0x40_0000), Owner::User);
    }

    #[test]
    fn each_owner_has_its_number_and_name() {
        for (number, owner) in Owner::ALL.into_iter().enumerate() {
            assert_eq!(owner as usize, number);
            assert_eq!(Owner::ALL.iter().filter(|other| other.name() == owner.name()).count(), 1);
        }
    }
}
