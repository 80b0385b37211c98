"""Many adapters in one batch, and several trained at once."""

from jlora.multi.bank import AdapterBank as AdapterBank
from jlora.multi.bank import BankFull as BankFull
from jlora.multi.bank import Counts as Counts
from jlora.multi.bank import UnknownAdapter as UnknownAdapter
from jlora.multi.rows import apply_rows as apply_rows
from jlora.multi.rows import check_index as check_index
from jlora.multi.rows import row_axes_of as row_axes_of
from jlora.multi.slots import Slots as Slots
from jlora.multi.slots import at as at
from jlora.multi.slots import empty as empty
from jlora.multi.slots import padded as padded
from jlora.multi.slots import put as put
from jlora.multi.together import Together as Together
from jlora.multi.together import stack as stack
from jlora.multi.together import train_together as train_together
from jlora.multi.together import unstack as unstack
